"""Stores behind URLs: what is refused, what is tried again, and what is said when nothing helps."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store import remote
from dittocache.embeddings.store.clearing import plan_clear
from dittocache.embeddings.store.gc import plan_gc
from dittocache.embeddings.store.inspection import inspect
from dittocache.embeddings.store.location import location
from dittocache.embeddings.store.packing import pack_records
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.verification import verify_store
from dittocache.errors import CacheError, RecordCorruptError, StoreUnavailableError

RECIPE: dict[str, Any] = {"artifact": "prompt_embeds", "schema": 1}
KEY = recipe_key(RECIPE)
TENSOR = torch.arange(24, dtype=torch.float32).reshape(4, 6)
URL = "faulty://bucket/cache"


class NoCredentialsError(Exception):
    """As botocore names it; no OSError."""


class HttpError(Exception):
    """As gcsfs names it; no OSError."""


class FaultyObjects(MemoryFileSystem):
    """An object store whose calls fail as often as a test says."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[dict[str, list[Exception]]] = {}
    calls: ClassVar[Counter[str]] = Counter()
    answer: ClassVar[Callable[[bytes], bytes] | None] = None

    def _meet(self, call: str) -> None:
        self.calls[call] += 1
        if self.faults.get(call):
            raise self.faults[call].pop(0)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self._meet("cat_file")
        content = bytes(super().cat_file(path, start, end, **options))
        return type(self).answer(content) if type(self).answer is not None else content

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._meet("pipe_file")
        super().pipe_file(path, value, mode, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._meet("info")
        return super().info(path, **options)

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        self._meet("find")
        try:
            return self.dircache[path]
        except KeyError:
            self.dircache[path] = found = super().find(path, *arguments, **options)
            return found

    def rm_file(self, path: str) -> None:
        self._meet("rm_file")
        super().rm_file(path)


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyObjects]]:
    fsspec.register_implementation("faulty", FaultyObjects, clobber=True)
    for held in (FaultyObjects.store, FaultyObjects.faults, FaultyObjects.calls):
        held.clear()
    FaultyObjects.answer = None
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    yield FaultyObjects


def ask_everything(store: Store) -> None:
    store.write(KEY, TENSOR, RECIPE)
    assert torch.equal(store.read(KEY), TENSOR)
    assert store.header(KEY).end == store.sizes([KEY])[KEY]
    assert list(store.keys()) == [KEY]


CALLS = ["cat_file", "pipe_file", "info", "find"]


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError(), HttpError("503")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("call", CALLS)
def test_what_passes_is_tried_again(faulty: type[FaultyObjects], call: str, error: Exception) -> None:
    faulty.faults[call] = [error] * 3
    ask_everything(Store(URL))
    assert not faulty.faults[call] and faulty.calls[call] >= 4


@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_pass_is_said(faulty: type[FaultyObjects], call: str) -> None:
    faulty.faults[call] = [OSError("no route to host")] * 4
    with pytest.raises(StoreUnavailableError, match="no route to host.*network"):
        ask_everything(Store(URL))
    assert not faulty.faults[call] and faulty.calls[call] == 4


@pytest.mark.parametrize(
    "error", [NoCredentialsError("Unable to locate credentials"), PermissionError("Access Denied")]
)
def test_who_is_not_logged_in_is_told_at_once(faulty: type[FaultyObjects], error: Exception) -> None:
    faulty.faults["cat_file"] = [error]
    with pytest.raises(StoreUnavailableError, match=f"{error}.*log in.*aws configure"):
        Store(URL)
    assert faulty.calls == {"cat_file": 1}


def test_a_bucket_that_is_not_there_is_said(faulty: type[FaultyObjects]) -> None:
    store = Store(URL)
    faulty.faults["pipe_file"] = [FileNotFoundError("The specified bucket does not exist")]
    with pytest.raises(StoreUnavailableError, match="bucket does not exist.*create the bucket"):
        store.write(KEY, TENSOR, RECIPE)
    assert list(store.keys()) == []


def test_an_answer_that_was_damaged_on_the_way_is_got_once_more(faulty: type[FaultyObjects]) -> None:
    store = Store(URL)
    store.write(KEY, TENSOR, RECIPE)

    def damage_once(content: bytes) -> bytes:
        faulty.answer = None
        return content[:-1]

    faulty.answer = damage_once
    assert torch.equal(store.read(KEY), TENSOR)
    assert KEY in store


def test_a_corrupt_record_that_cannot_be_moved_is_still_not_read(faulty: type[FaultyObjects]) -> None:
    store = Store(URL)
    store.write(KEY, TENSOR, RECIPE)
    faulty.answer = lambda content: content[:-1]
    faulty.faults["rm_file"] = [PermissionError("denied")]
    with pytest.raises(RecordCorruptError, match=f"could not be moved.*remove .*{KEY}"):
        store.read(KEY)


def test_a_record_that_was_mended_meanwhile_stays(faulty: type[FaultyObjects]) -> None:
    store = Store(URL)
    store.write(KEY, TENSOR, RECIPE)
    asked = iter([True, True, False])
    faulty.answer = lambda content: content[:-1] if next(asked) else content
    with pytest.raises(RecordCorruptError, match="replaced it meanwhile"):
        store.read(KEY)
    faulty.answer = None
    assert torch.equal(store.read(KEY), TENSOR)


def test_few_keys_cost_no_listing_and_many_one(faulty: type[FaultyObjects], monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(URL)
    store.write(KEY, TENSOR, RECIPE)
    faulty.calls.clear()
    assert set(store.sizes([KEY, "0" * 32])) == {KEY} and faulty.calls == {"info": 2}
    faulty.calls.clear()
    monkeypatch.setattr(remote, "LISTING_FROM", 2)
    assert set(store.sizes([KEY, "0" * 32])) == {KEY} and faulty.calls == {"find": 1}


def test_a_listing_is_never_an_old_one() -> None:
    store = Store(URL)
    assert list(store.keys()) == []
    store.write(KEY, TENSOR, RECIPE)
    assert list(store.keys()) == [KEY]


def test_what_needs_files_is_refused() -> None:
    store = Store(URL)
    assert not store.is_local and store.location == URL
    needing_files: list[Callable[[], object]] = [
        lambda: store.opened(KEY),
        lambda: store.root,
        lambda: store.local,
        store.rebuild_index,
        lambda: pack_records(store),
        lambda: plan_gc(store),
        lambda: plan_clear(store),
    ]
    for ask in needing_files:
        with pytest.raises(CacheError, match=f"{URL} are not in files.*expected a folder"):
            ask()


def test_records_are_verified_and_inspected_wherever_they_are(faulty: type[FaultyObjects]) -> None:
    store = Store(URL)
    store.write(KEY, TENSOR, RECIPE)
    assert verify_store(store).records == 1 and not verify_store(store).bad
    assert inspect(store, KEY)["path"] == URL
    name = f"{URL}/objects/{KEY[:2]}/{KEY}.safetensors"
    faulty().pipe_file(name, faulty().cat_file(name)[:-1])
    assert [bad.key for bad in verify_store(store).bad] == [KEY]


@pytest.mark.parametrize("name", [f"zz/{KEY}.safetensors", f"{KEY[:2]}/{KEY}.tmp", f"{KEY[:2]}/x.safetensors", KEY])
def test_objects_that_are_no_records_are_not_listed(faulty: type[FaultyObjects], name: str) -> None:
    faulty().pipe_file(f"{URL}/objects/{name}", b"anybody's")
    assert list(Store(URL).keys()) == []


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/cache", "s3fs"), ("gs://bucket/cache", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CacheError, match=f"cache_dir {url}.*pip install {package}"):
        Store(url)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(CacheError, match=r"cache_dir s4://bucket.*s4.*expected a folder, s3://"):
        Store("s4://bucket/cache")


def test_a_place_is_a_folder_or_a_url(tmp_path: Path) -> None:
    assert location("cache") == location(Path("cache")) == Path("cache")
    assert location("s3://bucket/a/") == "s3://bucket/a"
    assert location("file:///tmp/a%20b") == Path("/tmp/a b")
    assert location(f"local://{tmp_path}") == tmp_path
    assert type(Store(f"file://{tmp_path}")) is Store


@pytest.mark.parametrize("folded", [Path("s3://bucket/cache"), "s3:/bucket/cache"])
def test_a_url_whose_slashes_were_folded_is_refused(folded: Path | str) -> None:
    with pytest.raises(CacheError, match=r"'s3:/bucket/cache' is no folder and no URL.*s3://"):
        Store(folded)
