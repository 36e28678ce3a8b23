"""Manifests come back as they were saved, or are an error that says what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.embeddings.toy_family import Job

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.errors import CacheError, StoreUnavailableError

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
