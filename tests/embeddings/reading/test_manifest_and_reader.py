"""Manifests come back as they were saved; readers give verified samples in order."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.embeddings.toy_family import Job

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.reading.reader import BATCHES_AHEAD, CachedSamples
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, DataError, RecordCorruptError, RecordMissingError, StoreUnavailableError

NAMES = st.text(min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(NAMES, st.dictionaries(NAMES, st.sampled_from(["k1", "k2", "k3"]), max_size=3), max_size=4),
    st.lists(st.integers() | NAMES | st.lists(NAMES, max_size=2), min_size=3, max_size=3),
)
def test_a_manifest_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, dict[str, str]], values: list[object]
) -> None:
    recipes = {f"k{number}": {"artifact": "a", "transform": value} for number, value in enumerate(values, 1)}
    path = tmp_path_factory.mktemp("manifest") / "run" / "manifest.json"
    manifest = Manifest(samples, recipes, "toy")
    manifest.save(path)
    assert Manifest.load(path) == manifest
    assert list(Manifest.load(path).samples) == list(samples)


def test_what_recipes_share_is_written_once(job: Job) -> None:
    job.cache()
    path = job.folder / "manifest.json"
    job.previous.save(path)  # type: ignore[union-attr]
    assert Manifest.load(path) == job.previous
    assert path.read_text().count(job.template) == 1
    assert path.stat().st_size < 42 * 200


def test_a_manifest_that_cannot_be_used_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(CacheError, match=r"no manifest .*cache the data set first"):
        Manifest.load(path)
    for damaged in (
        "",
        "{",
        "[]",
        '{"version":1}',
        '{"version":1,"fields":[],"parts":[],"recipes":{"k":[0]},"samples":{}}',
    ):
        path.write_text(damaged)
        with pytest.raises(CacheError, match="damaged"):
            Manifest.load(path)
    path.write_text('{"version":7}')
    with pytest.raises(CacheError, match="version 7; expected 1"):
        Manifest.load(path)


def test_a_manifest_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    Manifest({"a": {}}).save(path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreUnavailableError, match="No space left"):
        Manifest({"b": {}}).save(path)
    assert list(Manifest.load(path).samples) == ["a"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_prefetched_batches_are_the_loaded_ones_in_order(job: Job, threads: int) -> None:
    job.cache()
    reader = CachedSamples(job.store, job.previous)  # type: ignore[arg-type]
    batches = [[job.samples[(7 * step + one) % 6].name for one in range(3)] for step in range(12)]
    expected = job.expected()
    count = 0
    for names, batch in zip(batches, reader.prefetch(iter(batches), threads), strict=True):
        for name, tensors in zip(names, batch, strict=True):
            assert all(torch.equal(tensors[artifact], expected[name][artifact]) for artifact in expected[name])
        count += 1
    assert count == 12


def test_prefetching_reads_a_bounded_number_of_batches_ahead_and_stops_when_closed(job: Job) -> None:
    job.cache()
    reader = CachedSamples(job.store, job.previous)  # type: ignore[arg-type]
    taken = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal taken
        while True:
            taken += 1
            yield ["sample-00"]

    stream = reader.prefetch(endless(), threads=2)
    next(stream)
    next(stream)
    assert taken == 2 * BATCHES_AHEAD + 2
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cached-samples")]


def test_an_error_comes_where_its_batch_would_have_come(job: Job) -> None:
    job.cache()
    key = job.previous.samples["sample-02"]["image_latents"]  # type: ignore[union-attr]
    path = job.store.root / "objects" / key[:2] / f"{key}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    stream = CachedSamples(job.store, job.previous).prefetch([[s.name] for s in job.samples])  # type: ignore[arg-type]
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(RecordCorruptError, match="sample 'sample-02', image_latents"):
        next(stream)


def test_a_sample_that_is_not_there_is_named(tmp_path: Path) -> None:
    reader = CachedSamples(Store(tmp_path), Manifest({"a": {"image_latents": "0" * 32}}))
    with pytest.raises(RecordMissingError, match="sample 'a', image_latents: record 0000"):
        reader.load("a")
    with pytest.raises(DataError, match="no sample 'b' among the 1"):
        reader.load("b")
    with pytest.raises(DataError, match="no artifact 'mask'; it has image_latents"):
        reader.artifact("a", "mask")


def test_what_is_read_may_be_changed_without_changing_the_store(job: Job) -> None:
    job.cache()
    reader = CachedSamples(job.store, job.previous)  # type: ignore[arg-type]
    reader.load("sample-00")["image_latents"].zero_()
    assert torch.equal(reader.load("sample-00")["image_latents"], job.expected()["sample-00"]["image_latents"])
