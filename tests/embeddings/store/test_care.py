"""Verifying, inspecting, counting and clearing a store."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.embeddings.store.records import assert_right, fill, key, recipe, tensor

from dittocache.embeddings.store.clearing import clear, plan_clear
from dittocache.embeddings.store.inspection import inspect, statistics
from dittocache.embeddings.store.packing import pack_records
from dittocache.embeddings.store.roots import register
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.verification import verify_store
from dittocache.errors import CacheError, RecordMissingError
from dittocache.events import EventLog, read_events


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Ten packed records and ten loose ones."""
    store = Store(tmp_path / "cache")
    fill(store, range(10))
    pack_records(store)
    fill(store, range(10, 20))
    return store


def damage(path: Path, content: bytes) -> None:
    """Flip a bit of these bytes where the file has them."""
    whole = path.read_bytes()
    assert whole.count(content) == 1
    path.write_bytes(whole.replace(content, bytes([content[0] ^ 1]) + content[1:]))


def last_bytes(store: Store, number: int) -> bytes:
    return store.fetch(key(number))[-400:]


def test_verifying_finds_every_bad_record_and_only_those(store: Store, tmp_path: Path) -> None:
    [pack] = (store.root / "packs").glob("*.safetensors")
    damage(pack, last_bytes(store, 3))
    damage(store.local.loose.path(key(15)), last_bytes(store, 15))
    log = EventLog(tmp_path / "events.jsonl", "verify")
    result = verify_store(store, log=log)
    assert result.records == 20 and {one.key for one in result.bad} == {key(3), key(15)}
    assert all("checksum" in one.reason or "header" in one.reason for one in result.bad)
    assert [event["done"] for event in read_events(log.path) if event["kind"] == "progress"][-1] == 20
    assert len(list((store.root / "quarantine").iterdir())) == 2
    for one in (store, Store(store.root)):
        assert not one.sizes([key(3), key(15)])
        assert_right(one, range(0, 3))
    again = verify_store(store)
    assert again.records == 18 and not again.bad and "all are as written" in again.describe()
    fill(store, range(20))
    assert_right(Store(store.root), range(20))


@pytest.mark.parametrize("number", [3, 13], ids=["packed", "loose"])
def test_inspecting_tells_everything_about_a_record(store: Store, tmp_path: Path, number: int) -> None:
    register(store, tmp_path / "run" / "manifest.json", [key(number)])
    found = inspect(store, key(number))
    assert found["recipe"] == recipe(number) and found["artifact"] == recipe(number)["artifact"]
    assert found["shape"] == list(tensor(number).shape) and found["bytes"] == store.bytes_of(key(number))
    assert found["place"] == ("pack" if number < 10 else "loose") and Path(found["path"]).is_file()
    assert found["checksum"] == "matches" and found["used_by"] == [str(tmp_path / "run" / "manifest.json")]
    copy = tmp_path / "copy"
    content = store.fetch(key(number))
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert inspect(store, copy)["key"] == key(number)
    assert inspect(store, copy)["checksum"].startswith("does not match")


def test_what_cannot_be_inspected_is_said(store: Store) -> None:
    with pytest.raises(RecordMissingError):
        inspect(store, "0" * 32)
    with pytest.raises(CacheError, match="neither a key of 32 hex digits nor a record's file"):
        inspect(store, "nowhere")


def test_statistics_count_every_record_once(store: Store) -> None:
    found = statistics(store)
    assert (found.loose, found.packed, found.packs) == (10, 10, 1)
    sizes = store.sizes([key(number) for number in range(20)])
    assert sum(found.bytes.values()) == found.loose_bytes + found.packed_bytes == sum(sizes.values())
    assert found.records["prompt_embeds", "toy", "no encoder"] == 7
    assert len(found.as_dict()["groups"]) == 3 and "prompt_embeds toy" in found.describe()


def test_clearing_removes_the_store_and_nothing_else(store: Store, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    register(store, tmp_path / "run" / "manifest.json", [key(1)])
    (store.local.loose.path(key(15)).parent / f".{key(15)}.0123456789ab-1.aa.tmp").write_bytes(b"half")
    (store.root / "leases").mkdir()
    (store.root / "leases" / "vae-0003.0").write_text("0123456789ab-1")
    foreign = [store.root / name for name in ("notes.txt", "objects/ab.txt", "packs/mine.safetensors", "roots/x/y")]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    plan = plan_clear(store)
    assert sorted(plan.foreign) == sorted(foreign) and "run" in plan.describe()
    assert len(list(store.keys())) == 20, "a plan removes nothing"
    assert clear(store).as_dict()["files"] == len(plan.files) + ("maintenance.lock" not in {p.name for p in plan.files})
    assert sorted(path for path in store.root.rglob("*") if path.is_file()) == sorted(foreign)
    assert list(Store(store.root).keys()) == []
    fill(store, range(3))
    assert_right(Store(store.root), range(3))
    assert (store.root / "layout.json").exists()


def test_clearing_leaves_no_empty_folder(store: Store) -> None:
    clear(store)
    assert not store.root.exists()
    assert clear(store).files == {}
