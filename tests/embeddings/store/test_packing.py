"""Packs: any safetensors reader opens them, every record in them proves itself, and packing loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.embeddings.store.records import assert_right, fill, key, tensor

from dittocache.embeddings.store.packing import pack_records
from dittocache.embeddings.store.store import Store

ALL = range(40)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "cache")
    fill(store, ALL)
    return store


def loose_files(store: Store) -> list[Path]:
    return sorted((store.root / "objects").rglob("*.safetensors"))


def pack_files(store: Store) -> list[Path]:
    return sorted((store.root / "packs").glob("*.safetensors"))


def test_packing_moves_every_record_and_keeps_it_readable(store: Store) -> None:
    sizes = store.sizes(list(store.keys()))
    verbatim = {one: store.fetch(one) for one in sizes}
    result = pack_records(store, pack_bytes=8000)
    assert result.records == len(ALL) and result.packs == len(pack_files(store)) > 2
    assert not loose_files(store)
    for reader in (store, Store(store.root)):
        assert sorted(reader.keys()) == sorted(sizes)
        assert reader.sizes(list(sizes)) == sizes
        assert {one: reader.fetch(one) for one in sizes} == verbatim
        assert_right(reader, ALL)


def test_any_safetensors_reader_finds_tensors_by_key(store: Store) -> None:
    pack_records(store)
    [pack] = pack_files(store)
    with safe_open(pack, framework="pt") as opened:
        for number in ALL:
            found = opened.get_tensor(key(number))
            assert found.dtype == tensor(number).dtype and torch.equal(found, tensor(number))
