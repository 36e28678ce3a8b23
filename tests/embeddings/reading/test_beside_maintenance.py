"""Readers go on while other processes pack, collect garbage and replace records of the same store."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from tests.embeddings.reading.records_on_disk import write

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.reading.reader import CachedBatches
from dittocache.embeddings.store.gc import collect, plan_gc
from dittocache.embeddings.store.packing import pack_records
from dittocache.embeddings.store.roots import register
from dittocache.embeddings.store.store import Store

ROUNDS = 4
ROWS, WIDTH = 40, 32


def _tensor(number: int) -> torch.Tensor:
    return torch.full((ROWS, WIDTH), number, dtype=torch.bfloat16)


def _maintain(root: Path) -> None:
    """Between the records that are read stand others, which go: packs are written anew around what stays."""
    torch.set_num_threads(1)
    store = Store(root)
    for turn in range(ROUNDS):
        for number in range(12):
            write(store, "image_latents", _tensor(number), doomed=number, turn=turn)
        pack_records(store, pack_bytes=20_000)
        collect(store, plan_gc(store, min_age_seconds=0.0))


@pytest.mark.parametrize("threads", [1, 3])
def test_packing_and_gc_of_other_records_do_not_disturb_a_reader(tmp_path: Path, threads: int) -> None:
    store = Store(tmp_path / "cache")
    keys: dict[str, dict[str, str]] = {}
    for number in range(16):
        keys[str(number)] = {"image_latents": write(store, "image_latents", _tensor(number), kept=number)}
        write(store, "image_latents", _tensor(number), doomed=number)
    manifest = Manifest(keys)
    manifest.save(tmp_path / "manifest.json")
    register(store, tmp_path / "manifest.json", manifest.keys, saved=True)
    reader = CachedBatches(store, manifest, pin=False)
    names = list(keys)
    batches = [names[first : first + 4] for first in range(0, 16, 4)]

    def epoch(passed: CachedBatches) -> None:
        for wanted, batch in zip(batches, passed.prefetch_batches(batches, threads), strict=True):
            assert torch.equal(batch["image_latents"], torch.stack([_tensor(int(name)) for name in wanted]))

    epoch(reader)
    late = CachedBatches(Store(store.root), manifest, pin=False)  # its index and headers stay those of before
    worker = multiprocessing.get_context("fork").Process(target=_maintain, args=(store.root,))
    worker.start()
    epochs = 0
    while worker.is_alive():
        epoch(reader)
        epochs += 1
    worker.join()
    assert worker.exitcode == 0
    epoch(reader)
    epoch(late)
    assert epochs > 1
    left = Store(store.root)
    assert set(left.keys()) == manifest.keys
    assert not list(left.local.loose.keys())
