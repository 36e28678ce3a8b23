"""The map-style data set gives what the reader gives, in this process and in forked and spawned workers."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from tests.embeddings.reading.records_on_disk import path_of, write_samples
from tests.embeddings.reading.test_batches import sample
from torch.utils.data import DataLoader

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.reading.dataset import CachedDataset
from dittocache.embeddings.reading.reader import CachedBatches
from dittocache.embeddings.store.store import Store
from dittocache.errors import DataError, RecordMissingError


@pytest.fixture
def cached(tmp_path: Path) -> tuple[Store, Manifest]:
    store = Store(tmp_path)
    return store, write_samples(store, {f"s{index}": sample(index, 2 + index) for index in range(5)})


@pytest.mark.parametrize("workers, context", [(0, None), (2, "fork"), (1, "spawn")])
def test_a_data_loader_gives_the_readers_batches(
    cached: tuple[Store, Manifest], workers: int, context: str | None
) -> None:
    dataset = CachedDataset(*cached)
    dataset[0]  # handles and headers of this process do not harm the workers
    loader = DataLoader(dataset, 2, collate_fn=dataset.collate, num_workers=workers, multiprocessing_context=context)
    reader = CachedBatches(*cached, pin=False)
    names = [["s0", "s1"], ["s2", "s3"], ["s4"]]
    for expected, batch in zip(names, loader, strict=True):
        direct = reader.batch(expected)
        assert set(batch) == set(direct)
        assert all(torch.equal(batch[artifact], tensor) for artifact, tensor in direct.items())


def test_length_items_and_pickling(cached: tuple[Store, Manifest]) -> None:
    dataset = pickle.loads(pickle.dumps(CachedDataset(*cached)))
    assert len(dataset) == 5
    assert dataset[3].name == dataset[-2].name == "s3"
    assert torch.equal(dataset[3].tensors["prompt_embeds"], sample(3, 5)["prompt_embeds"])
    with pytest.raises(IndexError):
        dataset[5]


def test_errors_name_the_sample(cached: tuple[Store, Manifest]) -> None:
    store, manifest = cached
    dataset = CachedDataset(store, manifest)
    path_of(store, manifest.samples["s2"]["img_shapes"]).unlink()
    with pytest.raises(RecordMissingError, match="sample 's2', img_shapes"):
        dataset[2]
    one, other = dataset[0], dataset[1]
    del other.tensors["img_shapes"]
    with pytest.raises(DataError, match="'s0' and 's1'"):
        dataset.collate([one, other])
