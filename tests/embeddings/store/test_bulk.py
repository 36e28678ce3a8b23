"""Records straight into packs: the same records as loose ones, whatever ends the writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store import pack_file
from dittocache.embeddings.store.bulk import PackWriter
from dittocache.embeddings.store.maintenance import maintenance
from dittocache.embeddings.store.storage import Storage, storage_field
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.verification import verify_store
from dittocache.errors import CacheError, StoreUnavailableError


def record(number: int, **fields: Any) -> tuple[str, torch.Tensor, dict[str, Any]]:
    recipe = {"artifact": "prompt_embeds", "family": "toy", "encoder": None, "number": number, **fields}
    return recipe_key(recipe), torch.randn(6, 16, generator=torch.Generator().manual_seed(number)), recipe


def test_packed_records_are_those_that_loose_ones_would_be(tmp_path: Path) -> None:
    loose, packed = Store(tmp_path / "loose"), Store(tmp_path / "packed")
    with PackWriter(packed, pack_bytes=3000) as writer:  # several packs
        for number in range(9):
            key, tensor, recipe = record(number)
            assert writer.write(key, tensor, recipe, provenance={"from": "test"}) > 384
            loose.write(key, tensor, recipe, provenance={"from": "test"})
    assert len(list((tmp_path / "packed/packs").glob("*.safetensors"))) > 1
    assert not (tmp_path / "packed/objects").exists()
    for key in list(loose.keys()):
        assert packed.fetch(key) == loose.fetch(key)
    assert sorted(packed.keys()) == sorted(loose.keys())
    assert not verify_store(Store(tmp_path / "packed")).bad


def test_what_is_there_stays_and_nothing_is_written_twice(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    key, tensor, recipe = record(1)
    store.write(key, tensor, recipe)
    with PackWriter(store) as writer:
        writer.write(key, tensor, recipe)
        other, other_tensor, other_recipe = record(2)
        writer.write(other, other_tensor, other_recipe)
        writer.write(other, other_tensor, other_recipe)
    assert sorted(store.keys()) == sorted([key, other])
    assert len(list((tmp_path / "cache/objects").rglob("*.safetensors"))) == 1


def test_a_record_may_share_rows_with_one_that_still_waits(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    base_key, base, base_recipe = record(1)
    base_recipe["artifact"] = "empty_prompt_embeds"
    base_key = recipe_key(base_recipe)
    storage = storage_field("prompt_embeds", Storage(shared_prefix=True), base_key)
    key, tensor, recipe = record(2, storage=storage)
    tensor[:4] = base[:4]
    with PackWriter(store) as writer:
        writer.write(base_key, base, base_recipe)
        writer.write(key, tensor, recipe)
    assert torch.equal(store.read(key), tensor)
    assert len(store.header(key).parts) == 2  # only two rows are stored, and their numbers


def test_what_was_taken_is_written_when_the_context_ends_in_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    key, tensor, recipe = record(1)
    with pytest.raises(KeyboardInterrupt), PackWriter(store) as writer:
        writer.write(key, tensor, recipe)
        raise KeyboardInterrupt
    assert torch.equal(store.read(key), tensor)


def test_a_full_disk_is_said_and_leaves_the_earlier_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "cache")
    first, tensor, recipe = record(1)
    with PackWriter(store) as writer:
        writer.write(first, tensor, recipe)

    def full(descriptor: int, content: memoryview) -> None:
        os.write(descriptor, content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_file, "_write_all", full)
    second, tensor_2, recipe_2 = record(2)
    with pytest.raises(StoreUnavailableError, match="disk is full"), PackWriter(store) as writer:
        writer.write(second, tensor_2, recipe_2)
    assert list(Store(tmp_path / "cache").keys()) == [first]
    assert not list((tmp_path / "cache/packs").glob(".*.tmp"))


def test_it_waits_for_nobody_who_moves_records(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    key, tensor, recipe = record(1)
    store.write(*record(3))
    with (
        maintenance(Store(tmp_path / "cache").local),
        pytest.raises(CacheError, match="packing or removing"),
        PackWriter(store) as writer,
    ):
        writer.write(key, tensor, recipe)
