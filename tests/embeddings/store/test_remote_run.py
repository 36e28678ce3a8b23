"""Caching and reading with a store behind a URL: the same tensors as with a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from tests.embeddings.toy_family import ENCODERS, Job

from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.embeddings.store.storage import Storage
from dittocache.embeddings.store.store import Store


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    url = f"memory://run/{tmp_path.name}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.mark.parametrize("storage", [Storage(), Storage("fp8", shared_prefix=True)], ids=["native", "fp8 rows"])
def test_a_run_over_a_url_gives_what_a_folder_gives(
    job: Job, url: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.storage = storage
    job.cache()
    names = [sample.name for sample in job.samples]
    in_folder = CachedSamples(job.store, job.plan().manifest)
    expected = {name: in_folder.load(name) for name in names}
    objects = Store(url)
    monkeypatch.setattr(Job, "store", objects)
    job.cache()
    plan = job.plan()
    assert not [need for encoder in ENCODERS for need in plan.work(encoder)]
    reader = CachedSamples(objects, plan.manifest)
    batches = [sample for batch in reader.prefetch([names[:4], names[4:]]) for sample in batch]
    for name, found in zip(names, batches, strict=True):
        loaded = reader.load(name)
        for artifact, tensor in expected[name].items():
            assert torch.equal(loaded[artifact], tensor) and torch.equal(found[artifact], tensor)
