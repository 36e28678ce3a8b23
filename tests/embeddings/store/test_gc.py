"""Garbage collection removes what no living run names, and nothing else, whatever starts beside it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tests.embeddings.store.records import assert_right, fill, key, recipe, tensor

from dittocache.embeddings.store import gc as gc_module
from dittocache.embeddings.store.gc import collect, plan_gc, remove_unshared
from dittocache.embeddings.store.packing import pack_records
from dittocache.embeddings.store.roots import Root, forget, machine_identity, register, roots
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, RecordMissingError, StoreUnavailableError

LIVE, DEAD = range(0, 20), range(20, 50)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "cache")
    fill(store, LIVE)
    fill(store, DEAD)
    return store


def saved_run(store: Store, name: str, numbers: range) -> Path:
    """A run folder with a manifest, registered."""
    manifest = store.root.parent / name / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text("{}")
    register(store, manifest, [key(number) for number in numbers], saved=True)
    return manifest


@pytest.mark.parametrize("packed", [False, True], ids=["loose", "packed"])
def test_what_no_run_names_goes_and_the_rest_stays(store: Store, packed: bool) -> None:
    saved_run(store, "run", LIVE)
    if packed:
        pack_records(store, pack_bytes=9000)
    reader = Store(store.root)
    assert_right(reader, range(50))
    plan = plan_gc(store, min_age_seconds=0)
    assert (plan.records, plan.kept[0]) == (len(DEAD), len(LIVE))
    assert sum(count for count, _ in plan.by_artifact.values()) == len(DEAD)
    assert len(list(store.keys())) == 50, "a plan removes nothing"
    result = collect(store, plan)
    assert result.records == len(DEAD) and result.bytes_removed == sum(plan.loose.values()) + sum(plan.packed.values())
    for one in (store, reader, Store(store.root)):
        assert sorted(one.keys()) == sorted(key(number) for number in LIVE)
        assert_right(one, LIVE)
    with pytest.raises(RecordMissingError):
        Store(store.root).read(key(DEAD[0]))
    assert plan_gc(store, min_age_seconds=0).records == 0
    assert not list((store.root / "trash").glob("*"))


def test_space_of_dead_packed_records_is_given_back(store: Store) -> None:
    saved_run(store, "run", range(0, 5))
    pack_records(store)
    [before] = (store.root / "packs").glob("*.safetensors")
    length = before.stat().st_size
    result = collect(store, plan_gc(store, min_age_seconds=0))
    [after] = (store.root / "packs").glob("*.safetensors")
    assert after != before and after.stat().st_size < length / 4 and result.packs_rewritten == 1
    assert_right(Store(store.root), range(0, 5))


def test_a_pack_with_few_dead_records_is_not_written_again(store: Store) -> None:
    saved_run(store, "run", range(0, 47))
    pack_records(store)
    [before] = (store.root / "packs").glob("*.safetensors")
    collect(store, plan_gc(store, min_age_seconds=0))
    assert list((store.root / "packs").glob("*.safetensors")) == [before]
    assert len(list(Store(store.root).keys())) == 47


def test_what_is_young_stays_even_without_a_run(store: Store) -> None:
    for path in (store.root / "objects").rglob(f"{key(21)}*"):
        os.utime(path, (time.time() - 7200,) * 2)
    plan = plan_gc(store, min_age_seconds=3600)
    assert list(plan.loose) == [key(21)] and plan.too_young == 49
    pack_records(store)
    assert plan_gc(store, min_age_seconds=3600).records == 0, "a pack is as old as its youngest record"
    collect(store, plan)
    assert_right(Store(store.root), range(20))


@pytest.mark.parametrize("packed", [False, True], ids=["loose", "packed"])
def test_a_run_that_registers_after_the_plan_keeps_its_records(store: Store, packed: bool) -> None:
    if packed:
        pack_records(store)
    plan = plan_gc(store, min_age_seconds=0)
    saved_run(store, "late", LIVE)
    result = collect(store, plan)
    assert result.brought_back == len(LIVE) and result.records == len(DEAD)
    assert_right(Store(store.root), LIVE)


@pytest.mark.parametrize("packed", [False, True], ids=["loose", "packed"])
def test_a_run_that_registers_while_records_are_marked_finds_them_or_sees_that_they_are_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Registered between marking and the second look: back. After the second look: missing before the run looks."""
    if packed:
        pack_records(store)
    real, seen = gc_module.roots, {}

    def with_runs_beside(of: Store) -> list[Root]:
        if not seen:
            saved_run(store, "before", range(0, 5))
            found = real(of)
            saved_run(store, "after", range(5, 10))
            seen["after"] = Store(store.root).sizes([key(number) for number in range(5, 10)])
            return found
        return real(of)

    plan = plan_gc(store, min_age_seconds=0)
    monkeypatch.setattr(gc_module, "roots", with_runs_beside)
    collect(store, plan)
    assert_right(Store(store.root), range(0, 5))
    assert seen["after"] == {}


@pytest.mark.parametrize("packed", [False, True], ids=["loose", "packed"])
def test_interrupted_between_marking_and_removing_everything_is_back(
    store: Store, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    if packed:
        pack_records(store)
    plan = plan_gc(store, min_age_seconds=0)

    def interrupted(_: Store) -> list[Root]:
        assert_right(Store(store.root), range(50)) if not packed else None  # the trash is still readable
        raise KeyboardInterrupt

    monkeypatch.setattr(gc_module, "roots", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(store, plan)
    assert len(store.sizes([key(number) for number in range(50)])) == 50
    assert_right(Store(store.root), range(50))


@pytest.mark.parametrize("call", ["write", "replace", "unlink"])
@pytest.mark.parametrize("after", [0, 2, 7])
@pytest.mark.parametrize("packed", [False, True], ids=["loose", "packed"])
def test_what_the_disk_refuses_loses_nothing_that_is_in_use(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, after: int, packed: bool
) -> None:
    saved_run(store, "run", LIVE)
    if packed:
        pack_records(store, pack_bytes=6000)
    plan = plan_gc(store, min_age_seconds=0)
    real, calls = getattr(os, call), itertools.count()

    def refuse(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with contextlib.suppress(StoreUnavailableError):  # not every call comes so far
            collect(store, plan)
    for one in (store, Store(store.root)):
        assert_right(one, LIVE)
    for _ in range(2):  # the first one puts back what the interrupted one had taken out
        collect(store, plan_gc(store, min_age_seconds=0))
    assert sorted(store.keys()) == sorted(key(number) for number in LIVE)
    assert_right(Store(store.root), LIVE)


def test_a_run_is_dead_once_its_manifest_is_gone(store: Store) -> None:
    manifest = saved_run(store, "run", LIVE)
    assert not roots(store)[0].is_dead()
    shutil.rmtree(manifest.parent)
    assert roots(store)[0].is_dead() and not roots(store)[0].is_dead(grace_seconds=60)
    plan = plan_gc(store, min_age_seconds=0)
    assert [root.manifest for root in plan.dead_roots] == [manifest] and str(manifest) in plan.describe()
    assert collect(store, plan).roots_forgotten == 1
    assert roots(store) == [] and list(store.keys()) == []


def test_a_run_that_has_not_saved_its_manifest_lives_as_long_as_its_folder(store: Store) -> None:
    folder = store.root.parent / "run"
    folder.mkdir()
    register(store, folder / "manifest.json", [key(number) for number in LIVE])
    assert not roots(store)[0].is_dead()
    folder.rmdir()
    assert roots(store)[0].is_dead()


def test_until_the_manifest_is_saved_its_former_records_are_in_use(store: Store) -> None:
    manifest = saved_run(store, "run", range(0, 10))
    assert len(register(store, manifest, [key(number) for number in range(8, 20)])) == 20
    assert len(register(store, manifest, [key(number) for number in range(8, 20)], saved=True)) == 12


@pytest.mark.parametrize("change", ["machine", "mount"])
def test_a_run_that_cannot_be_looked_at_lives_until_it_is_forgotten(
    store: Store, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "machine":
        monkeypatch.setattr("dittocache.embeddings.store.roots.machine_identity", lambda: "other")
    else:
        monkeypatch.setattr("dittocache.embeddings.store.roots._mount_of", lambda path: Path("/not/mounted"))
    manifest = saved_run(store, "run", LIVE)
    monkeypatch.undo()
    shutil.rmtree(manifest.parent)
    plan = plan_gc(store, min_age_seconds=0)
    assert plan.kept[0] == len(LIVE) and "cannot be looked at from here" in plan.describe()
    forget(store, str(manifest))
    assert plan_gc(store, min_age_seconds=0).kept[0] == 0
    with pytest.raises(CacheError, match="has no root"):
        forget(store, str(manifest))
    assert machine_identity() != "other"


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"\xff\n"])
def test_a_damaged_root_stops_gc(store: Store, damage: bytes) -> None:
    saved_run(store, "run", LIVE)
    [path] = (store.root / "roots").glob("*.root")
    path.write_bytes(damage or path.read_bytes()[:-1])
    with pytest.raises(CacheError, match=f"root {path} cannot be read"):
        plan_gc(store, min_age_seconds=0)
    assert len(list(store.keys())) == 50


def test_remove_unshared_takes_what_only_this_run_uses(store: Store) -> None:
    saved_run(store, "other", range(0, 10))
    manifest = store.root.parent / "own" / "manifest.json"
    manifest.parent.mkdir()
    own = register(store, manifest, [key(number) for number in range(5, 25)])
    pack_records(store, pack_bytes=9000)
    fill(store, range(50, 55))
    result = remove_unshared(store, [key(number) for number in [*range(5, 25), 50, 51]], own)
    assert result.records == 17 and result.roots_forgotten == 1
    left = set(Store(store.root).keys())
    assert left == {key(number) for number in [*range(0, 10), *range(25, 50), 52, 53, 54]}
    assert_right(store, range(0, 10))


def test_a_record_that_was_written_again_after_the_plan_stays(store: Store) -> None:
    plan = plan_gc(store, min_age_seconds=0.05)
    time.sleep(0.06)
    plan = plan_gc(store, min_age_seconds=0.05)
    assert plan.records == 50
    store.write(key(3), tensor(3), recipe(3), replace=True)
    collect(store, plan)
    assert list(store.keys()) == [key(3)]


def test_half_written_files_and_quarantine_go(store: Store) -> None:
    path = store.local.loose.path(key(1))
    path.write_bytes(b"damaged")
    with pytest.raises(CacheError):
        store.read(key(1))
    for folder in (path.parent, store.root / "packs"):
        folder.mkdir(exist_ok=True)
        torn = folder / f".{key(1)}.0123456789ab-1.aa.tmp"
        torn.write_bytes(b"half")
        os.utime(torn, (1, 1))
    plan = plan_gc(store, min_age_seconds=0)
    assert len(plan.temporaries) == 2 and len(plan.quarantine) == 1
    assert collect(store, plan).files_removed == 3
    assert not list((store.root / "quarantine").iterdir()) and not list(store.root.rglob("*.tmp"))
