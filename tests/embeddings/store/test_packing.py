"""Packs: any safetensors reader opens them, every record in them proves itself, and packing loses nothing."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import pickle
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.embeddings.store.records import assert_right, fill, key, recipe, tensor

from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store import packing, packs, writer_id
from dittocache.embeddings.store.clearing import clear
from dittocache.embeddings.store.gc import collect, plan_gc
from dittocache.embeddings.store.maintenance import maintenance
from dittocache.embeddings.store.pack_index import PackIndex
from dittocache.embeddings.store.packing import pack_records
from dittocache.embeddings.store.packs import PackedRecords
from dittocache.embeddings.store.roots import register
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError, StoreUnavailableError

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


def test_records_with_companions_and_shared_rows_are_packed_verbatim(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    base = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    recipes: dict[str, dict[str, Any]] = {"base": {"artifact": "empty_prompt_embeds", "inputs": [1]}}
    tensors = {"base": base, "fp8": base + 1, "rows": torch.cat([base[:6], base[6:] + 1])}
    recipes["fp8"] = {"artifact": "prompt_embeds", "inputs": [2], "storage": {"dtype": "fp8_e4m3_token"}}
    recipes["rows"] = {
        "artifact": "prompt_embeds",
        "inputs": [3],
        "storage": {"rows_shared_with": recipe_key(recipes["base"])},
    }
    for name, one in recipes.items():
        store.write(recipe_key(one), tensors[name], one)
    before = {name: store.read(recipe_key(one)) for name, one in recipes.items()}
    pack_records(store)
    assert not loose_files(store)
    for reader in (store, Store(store.root)):
        for name, one in recipes.items():
            assert torch.equal(reader.read(recipe_key(one)), before[name])
    [pack] = pack_files(store)
    with safe_open(pack, framework="pt") as opened:
        names = set(opened.keys())
        fp8, rows = recipe_key(recipes["fp8"]), recipe_key(recipes["rows"])
        assert opened.get_tensor(fp8).dtype == torch.float8_e4m3fn
        assert {f"{fp8}.scale", f"{fp8}.header", rows, f"{rows}.rows"} <= names


def test_packing_again_packs_only_what_is_new(store: Store) -> None:
    pack_records(store)
    before = pack_files(store)
    fill(store, range(40, 50))
    assert pack_records(store).records == 10
    assert set(before) < set(pack_files(store)) and len(pack_files(store)) == 2
    assert_right(Store(store.root), range(50))
    assert pack_records(store).as_dict()["records"] == 0


def test_writing_a_packed_record_again_changes_nothing_unless_it_is_to_be_replaced(store: Store) -> None:
    pack_records(store)
    store.write(key(3), tensor(3), recipe(3))
    assert not loose_files(store)
    reader = Store(store.root)
    assert_right(reader, range(3, 4))
    store.write(key(3), tensor(3), recipe(3), replace=True, provenance={"again": True})
    assert len(loose_files(store)) == 1
    for one in (store, Store(store.root)):
        assert one.header(key(3)).provenance == {"again": True}
        assert sorted(one.keys()) == sorted(key(number) for number in ALL)
    assert reader.sizes([key(3)]) == store.sizes([key(3)])
    assert reader.header(key(3)).provenance == {"again": True}
    assert pack_records(store).records == 1
    assert Store(store.root).header(key(3)).provenance == {"again": True}


def test_a_corrupt_loose_record_is_not_packed(store: Store) -> None:
    path = store.local.loose.path(key(7))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = pack_records(store)
    assert result.corrupt == [key(7)] and result.records == 39 and "1 corrupt" in result.describe()
    assert key(7) not in store and not path.exists()
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_a_corrupt_packed_record_is_quarantined_and_made_anew(store: Store) -> None:
    verbatim = store.fetch(key(7))
    pack_records(store)
    [pack] = pack_files(store)
    content = pack.read_bytes()
    place = content.index(verbatim)
    pack.write_bytes(content[:place] + b"damaged!" + content[place + 8 :])
    with pytest.raises(RecordCorruptError, match="moved to .*quarantine"):
        store.read(key(7))
    assert [path.read_bytes()[8:] for path in (store.root / "quarantine").iterdir()] == [verbatim[8:]]
    for one in (store, Store(store.root)):
        assert key(7) not in one
        with pytest.raises(RecordMissingError):
            one.read(key(7))
    store.write(key(7), tensor(7), recipe(7))
    assert_right(Store(store.root), ALL)
    pack_records(store)
    assert_right(Store(store.root), ALL)
    store.rebuild_index()
    assert_right(Store(store.root), ALL)


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_missing_or_damaged_index_is_rebuilt(store: Store, change: Callable[[Path], object]) -> None:
    pack_records(store, pack_bytes=6000)
    change(store.root / "packs" / "index")
    for reader in (Store(store.root), store):
        assert len(reader.sizes([key(number) for number in ALL])) == len(ALL)
        assert_right(reader, ALL)
    pack_records(store)
    (store.root / "packs").chmod(0o755)
    assert PackIndex.from_bytes((store.root / "packs" / "index").read_bytes()).keys()
    change(store.root / "packs" / "index")
    assert store.rebuild_index() == len(ALL)
    assert_right(Store(store.root), ALL)


def test_a_truncated_or_missing_pack_leaves_its_records_missing(store: Store) -> None:
    pack_records(store, pack_bytes=6000)
    first, second, *_ = pack_files(store)
    lost = {one for one in sorted(store.keys()) if store.local.packed.find(one).pack == first.stem}
    torn = {one for one in sorted(store.keys()) if store.local.packed.find(one).pack == second.stem}
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    reader = Store(store.root)
    assert not lost & reader.sizes(list(lost)).keys()
    assert torn - reader.sizes(list(torn)).keys()
    wrong = {number for number in ALL if key(number) in lost | torn}
    for number in wrong:
        with contextlib.suppress(RecordMissingError, RecordCorruptError):
            assert torch.equal(reader.read(key(number)), tensor(number))
    fill(reader, ALL)
    for one in (reader, Store(store.root)):
        assert_right(one, ALL)
    pack_records(store)
    assert_right(Store(store.root), ALL)


def test_only_one_process_packs_at_a_time(store: Store) -> None:
    with maintenance(store.local):
        for work in (pack_records, Store.rebuild_index, clear):
            with pytest.raises(CacheError, match=f"another process.*{writer_id.current()}.*wait until it has finished"):
                work(Store(store.root))
    assert pack_records(store).records == len(ALL)


def test_an_owner_on_another_machine_is_believed_for_a_while(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = store.root / "maintenance.lock"
    lock.write_text("0123456789ab-77")
    with pytest.raises(CacheError, match="0123456789ab-77"):
        pack_records(store)
    os.utime(lock, (time.time() - 700,) * 2)
    assert pack_records(store).records == len(ALL)


def test_an_owner_that_died_here_is_no_obstacle(store: Store) -> None:
    machine = writer_id.current().split("-")[0]
    (store.root / "maintenance.lock").write_text(f"{machine}-4194399")
    assert pack_records(store).records == len(ALL)


@pytest.mark.parametrize("step", ["write_pack", "publish", "to_trash"])
def test_stopped_at_any_step_nothing_is_lost_and_the_next_run_finishes(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The step is carried out, and then the process is interrupted."""
    owner: Any = PackedRecords if step == "publish" else packing
    real = getattr(owner, step)

    def carried_out_then_stopped(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, carried_out_then_stopped)
        with pytest.raises(KeyboardInterrupt):
            pack_records(store, pack_bytes=6000)
    for one in (store, Store(store.root)):
        assert_right(one, ALL)
    pack_records(store, pack_bytes=6000)
    assert not loose_files(store) and sorted(store.keys()) == sorted(key(number) for number in ALL)
    assert {path.stem for path in pack_files(store)} == set(store.local.packed.snapshot.index.packs)
    assert_right(Store(store.root), ALL)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["write", "replace", "fsync"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_what_the_disk_refuses_while_packing_loses_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, call: str, after: int
) -> None:
    real, calls = getattr(os, call), itertools.count()

    def refuse(*arguments: Any) -> Any:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StoreUnavailableError, match="cannot be packed"):
            pack_records(store, pack_bytes=6000)
    assert not list((store.root / "packs").glob("*.tmp"))
    assert_right(Store(store.root), ALL)
    pack_records(store, pack_bytes=6000)
    assert_right(store, ALL)
    assert not loose_files(store)


def test_readers_notice_nothing_of_packing_and_collecting(store: Store) -> None:
    """Threads read through one store while another packs, replaces, collects and packs again."""
    manifest = store.root.parent / "manifest.json"
    manifest.write_text("{}")
    register(store, manifest, [key(number) for number in ALL], saved=True)
    reader, stop = Store(store.root), threading.Event()

    def read_on(seed: int) -> int:
        choose, reads = random.Random(seed), 0
        while not stop.is_set() or reads < 50:
            number = choose.choice(ALL)
            assert_right(reader, range(number, number + 1))
            reads += 1
        return reads

    with ThreadPoolExecutor(3) as pool:
        reading = [pool.submit(read_on, seed) for seed in range(3)]
        try:
            for number in range(100, 140, 10):
                fill(store, range(number, number + 10))
                pack_records(store, pack_bytes=5000)
                store.write(key(number % 7), tensor(number % 7), recipe(number % 7), replace=True)
                collect(store, plan_gc(store, min_age_seconds=0))
        finally:
            stop.set()
        assert all(future.result() >= 50 for future in reading)
    assert len(list(store.keys())) == len(ALL)


def test_a_reader_keeps_few_packs_open(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "OPEN_PACKS", 3)
    pack_records(store, pack_bytes=1)
    assert len(pack_files(store)) == len(ALL)
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    reader = Store(store.root)
    for _ in range(2):
        assert_right(reader, ALL)
    assert len(os.listdir("/dev/fd")) <= before + 3


def test_a_store_can_be_sent_to_another_process(store: Store) -> None:
    pack_records(store)
    assert_right(store, ALL)
    assert_right(pickle.loads(pickle.dumps(store)), ALL)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_packs_are_an_error_of_ours_or_the_right_tensor(store: Store, data: st.DataObject) -> None:
    if loose_files(store):
        pack_records(store)
        store.local.packed.path("0" * 32).write_bytes(pack_files(store)[0].read_bytes())
    [spare, pack] = pack_files(store)
    whole = spare.read_bytes()
    damaged = bytearray(whole)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 2000)))
    damaged[start:end] = data.draw(st.binary(max_size=100) | st.just(bytes(end - start)))
    pack.write_bytes(damaged)
    shutil.rmtree(store.root / "packs" / "dropped", ignore_errors=True)
    with_index, without_index = Store(store.root), Store(store.root)
    without_index.local.packed.index_path = store.root / "packs" / "none"
    spare_path = store.root / "spare"
    spare.rename(spare_path)
    try:
        for reader in (with_index, without_index):
            for number in ALL:
                with contextlib.suppress(RecordMissingError, RecordCorruptError):
                    assert torch.equal(reader.read(key(number)), tensor(number))
    finally:
        spare_path.rename(spare)


def test_a_record_that_is_replaced_while_it_is_packed_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real, other = packing.write_pack, Store(store.root)

    def replaced_meanwhile(*arguments: Any) -> Any:
        other.write(key(3), tensor(3), recipe(3), replace=True, provenance={"again": True})
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_pack", replaced_meanwhile)
        pack_records(store)
    assert loose_files(store) == [store.local.loose.path(key(3))]
    assert_right(Store(store.root), ALL)
