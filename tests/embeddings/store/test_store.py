"""Records: the same tensor or an error, whatever happens to the file, the disk or the writer."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file

from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store import durable, writer_id
from dittocache.embeddings.store.record import DTYPES, pack, unpack
from dittocache.embeddings.store.store import NewRecord, Store
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError, StoreUnavailableError

RECIPE: dict[str, Any] = {"artifact": "prompt_embeds", "schema": 1, "inputs": ["é", 1.5, None]}
KEY = recipe_key(RECIPE)
TENSOR = torch.arange(24, dtype=torch.float32).reshape(4, 6).to(torch.bfloat16)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def path_of(store: Store, key: str = KEY) -> Path:
    return store.root / "objects" / key[:2] / f"{key}.safetensors"


def quarantined(store: Store) -> list[Path]:
    return sorted((store.root / "quarantine").glob("*"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4), (2, 1, 3)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    tensor = (torch.arange(count) % 2 == 0).reshape(shape) if dtype == torch.bool else torch.arange(count).to(dtype)
    tensor = tensor.reshape(shape)
    loaded = unpack(bytearray(pack(KEY, tensor, RECIPE)), KEY)
    assert loaded.dtype == dtype and loaded.shape == tensor.shape
    assert torch.equal(loaded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_strided_and_differentiable_tensors_are_stored_as_they_read(store: Store) -> None:
    tensor = torch.randn(6, 4, requires_grad=True).t()[1:]
    store.write(KEY, tensor, RECIPE)
    assert torch.equal(store.read(KEY), tensor)


def test_a_record_is_a_safetensors_file_named_by_its_artifact(store: Store) -> None:
    length = store.write(KEY, TENSOR, RECIPE)
    assert length == path_of(store).stat().st_size == store.bytes_of(KEY)
    [(name, tensor)] = load_file(path_of(store)).items()
    assert name == "prompt_embeds" and torch.equal(tensor, TENSOR)
    assert store.recipe_of(KEY) == RECIPE
    assert KEY in store and list(store.keys()) == [KEY]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_follows_the_umask(store: Store, umask: int, mode: int) -> None:
    previous = os.umask(umask)
    try:
        store.write(KEY, TENSOR, RECIPE)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path_of(store).stat().st_mode) == mode


def test_writing_again_changes_nothing(store: Store) -> None:
    length = store.write(KEY, TENSOR, RECIPE)
    before = path_of(store).stat()
    assert store.write(KEY, TENSOR, RECIPE) == length
    assert path_of(store).stat() == before


def test_a_key_of_another_recipe_is_refused(store: Store) -> None:
    with pytest.raises(CacheError, match="does not belong to this recipe"):
        store.write("0" * 32, TENSOR, RECIPE)
    with pytest.raises(CacheError, match="is no key"):
        store.read("../../etc/passwd")
    with pytest.raises(CacheError, match="dtype torch.complex64"):
        store.write(KEY, torch.zeros(1, dtype=torch.complex64), RECIPE)


def test_a_missing_record_is_named(store: Store) -> None:
    assert KEY not in store and store.sizes([KEY]) == {}
    for ask in (store.read, store.bytes_of, store.recipe_of):
        with pytest.raises(RecordMissingError, match=KEY):
            ask(KEY)


@pytest.mark.parametrize("length", [0, 4, 8, 60, -1, -40], ids=lambda length: f"to {length}")
def test_a_truncated_record_counts_as_missing_and_is_quarantined_when_read(store: Store, length: int) -> None:
    store.write(KEY, TENSOR, RECIPE)
    content = path_of(store).read_bytes()
    path_of(store).write_bytes(content[:length])
    assert KEY not in store
    with pytest.raises(RecordCorruptError, match=f"record {KEY}.*moved to.*quarantine"):
        store.read(KEY)
    [moved] = quarantined(store)
    assert moved.read_bytes() == content[:length]
    with pytest.raises(RecordMissingError):
        store.read(KEY)
    store.write(KEY, TENSOR, RECIPE)
    assert torch.equal(store.read(KEY), TENSOR)


def test_writing_replaces_a_torn_record(store: Store) -> None:
    store.write(KEY, TENSOR, RECIPE)
    path_of(store).write_bytes(path_of(store).read_bytes()[:-1])
    store.write(KEY, TENSOR, RECIPE)
    assert torch.equal(store.read(KEY), TENSOR)


@pytest.mark.parametrize("suffix", [b"\0", b"more"])
def test_a_record_that_grew_is_corrupt(store: Store, suffix: bytes) -> None:
    store.write(KEY, TENSOR, RECIPE)
    with path_of(store).open("ab") as stream:
        stream.write(suffix)
    assert KEY not in store
    with pytest.raises(RecordCorruptError):
        store.read(KEY)


def test_every_flipped_bit_is_found() -> None:
    content = pack(KEY, TENSOR, RECIPE)
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            with pytest.raises(RecordCorruptError):
                unpack(damaged, KEY)


@pytest.mark.parametrize(
    ("before", "after"),
    [(b'"BF16"', b'"I16" '), (b"[4,6]", b"[6,4]"), (b'"prompt_embeds":{', b'"Prompt_embeds":{')],
    ids=["dtype", "shape", "name"],
)
def test_a_header_that_gives_the_same_bytes_another_meaning_is_found(before: bytes, after: bytes) -> None:
    content = pack(KEY, TENSOR, RECIPE)
    assert content.count(before) == 1 and len(before) == len(after)
    with pytest.raises(RecordCorruptError):
        unpack(bytearray(content.replace(before, after)), KEY)


def test_a_record_under_another_name_is_not_believed(store: Store) -> None:
    other = {**RECIPE, "schema": 2}
    store.write(KEY, TENSOR, RECIPE)
    target = path_of(store, recipe_key(other))
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path_of(store), target)
    with pytest.raises(RecordCorruptError, match=f"holds key {KEY}"):
        store.read(recipe_key(other))
    assert len(quarantined(store)) == 1


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_an_error_of_ours_or_the_right_tensor(data: st.DataObject) -> None:
    content = bytearray(pack(KEY, TENSOR, RECIPE))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 40)))
        content[start:end] = data.draw(st.binary(max_size=40))
    try:
        tensor = unpack(content, KEY)
    except RecordCorruptError:
        return
    assert tensor.dtype == TENSOR.dtype and torch.equal(tensor, TENSOR)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(["__metadata__", "prompt_embeds", "x"]),
        st.recursive(
            st.none()
            | st.integers()
            | st.floats()
            | st.text(max_size=8)
            | st.sampled_from(["BF16", "dittocache-2", KEY]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["dtype", "shape", "data_offsets", "format", "key", "checksum", "recipe"]), inner
                )
            ),
            max_leaves=12,
        ),
    ),
    st.binary(max_size=16),
)
def test_a_forged_header_is_an_error_of_ours(header: dict[str, Any], payload: bytes) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(RecordCorruptError):
        unpack(bytearray(len(text).to_bytes(8, "little") + text + payload), KEY)


MENDS = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "quota",
    errno.EROFS: "read-only",
    errno.EACCES: "owner or mode",
    errno.ENAMETOOLONG: "shorter cache_dir",
    errno.EIO: "disk or network mount",
}


# Errors are injected because the superuser, who may run the tests, is denied nothing.
@pytest.mark.parametrize("number", MENDS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "replace"])
def test_what_the_disk_refuses_is_an_error_that_says_how_to_mend_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    real_open = os.open

    def refuse_to_create(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            refuse()
        return real_open(path, flags, *mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse_to_create if call == "open" else refuse)
        with pytest.raises(StoreUnavailableError, match=MENDS[number]) as caught:
            store.write(KEY, TENSOR, RECIPE)
    assert isinstance(caught.value, OSError) and KEY in str(caught.value)
    assert [path for path in store.root.rglob("*") if path.is_file()] in ([], [store.root / "layout.json"])
    store.write(KEY, TENSOR, RECIPE)
    assert torch.equal(store.read(KEY), TENSOR)


def test_a_path_that_is_too_long_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="shorter cache_dir"):
        Store(tmp_path / ("x" * 300)).write(KEY, TENSOR, RECIPE)


def test_a_file_in_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StoreUnavailableError, match="choose another cache_dir"):
        Store(tmp_path / "cache").write(KEY, TENSOR, RECIPE)


def test_a_corrupt_record_that_cannot_be_moved_is_still_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(KEY, TENSOR, RECIPE)
    path_of(store).write_bytes(b"damaged")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RecordCorruptError, match=f"could not be moved.*remove {path_of(store)}"):
        store.read(KEY)


def test_a_record_that_was_mended_meanwhile_is_not_quarantined(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(KEY, TENSOR, RECIPE)
    good = path_of(store).read_bytes()
    path_of(store).write_bytes(good[:-1])

    def mended_meanwhile(content: memoryview, key: str, **_: object) -> torch.Tensor:
        durable.replace_file(path_of(store), good)  # another process
        return unpack(content, key)

    monkeypatch.setattr("dittocache.embeddings.store.store.unpack", mended_meanwhile)
    with pytest.raises(RecordCorruptError, match="replaced it meanwhile"):
        store.read(KEY)
    monkeypatch.undo()
    assert torch.equal(store.read(KEY), TENSOR)


def test_sweeping_takes_the_temporaries_of_dead_writers_only(store: Store) -> None:
    store.write(KEY, TENSOR, RECIPE)
    folder = path_of(store).parent
    machine = writer_id.current().split("-")[0]
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead, alive = folder / f".{KEY}.{machine}-{child}.aa.tmp", folder / f".{KEY}.{writer_id.current()}.bb.tmp"
    elsewhere, forgotten = folder / f".{KEY}.0123456789ab-1.cc.tmp", folder / f".{KEY}.0123456789ab-2.dd.tmp"
    for path in (dead, alive, elsewhere, forgotten):
        path.write_bytes(b"half a record")
    os.utime(forgotten, (time.time() - 3700,) * 2)
    assert store.sweep() == 2
    assert not dead.exists() and not forgotten.exists()
    assert alive.exists() and elsewhere.exists()
    assert torch.equal(store.read(KEY), TENSOR)


def test_a_killed_writer_leaves_no_record_under_its_final_name(tmp_path: Path) -> None:
    """The process ends at every step of writing, without any clean-up."""
    for number, call in enumerate(["mkdir", "open", "write", "fsync", "replace"]):
        store = Store(tmp_path / str(number))
        child = os.fork()
        if child == 0:
            setattr(os, call, lambda *_, **__: os._exit(9))
            store.write(KEY, TENSOR, RECIPE)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert KEY not in store and list(store.keys()) == []
        store.write(KEY, TENSOR, RECIPE)
        store.sweep()
        assert torch.equal(store.read(KEY), TENSOR)
        assert not list(store.root.rglob("??/*.tmp"))


def test_a_store_of_another_version_is_left_alone(store: Store) -> None:
    store.write(KEY, TENSOR, RECIPE)
    for version, mend in ((3, "upgrade dittocache"), (1, "remove .* and cache the data set again")):
        (store.root / "layout.json").write_text(json.dumps({"version": version}))
        with pytest.raises(CacheError, match=mend):
            Store(store.root)
    (store.root / "layout.json").write_text("{")
    with pytest.raises(CacheError, match="remove it"):
        Store(store.root)


def test_records_hold_nothing_that_a_pickle_could(store: Store) -> None:
    content = pack(KEY, TENSOR, RECIPE)
    assert torch.equal(load(content)["prompt_embeds"], TENSOR)
    assert len(content) < TENSOR.numel() * TENSOR.itemsize + 600


def test_many_records_at_once_are_those_of_one_by_one(tmp_path: Path) -> None:
    together, apart = Store(tmp_path / "together"), Store(tmp_path / "apart")
    new = []
    for number in range(5):
        recipe = {"artifact": "image_latents", "number": number}
        new.append(NewRecord(recipe_key(recipe), torch.full((3, 2), float(number)), recipe, {"made": "here"}))
    together.write(new[2].key, new[2].tensor, new[2].recipe)  # without provenance: what is there stays
    lengths = together.write_many(new)
    apart.write(new[2].key, new[2].tensor, new[2].recipe)
    for record, length in zip(new, lengths, strict=True):
        assert length == apart.write(record.key, record.tensor, record.recipe, provenance=record.provenance)
        assert together.fetch(record.key) == apart.fetch(record.key)
    together.write_many([replace(new[0], tensor=torch.zeros(3, 2))], replace=True)
    assert torch.equal(together.read(new[0].key), torch.zeros(3, 2))


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_when_many_fail_those_with_a_name_are_whole_and_nothing_else_is_left(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    recipes = [{"artifact": "image_latents", "number": number} for number in range(6)]
    store.write(recipe_key(recipes[0]), torch.zeros(2), recipes[0])  # the layout and a folder are there
    real, count = getattr(os, call), 0

    def fails(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    for recipe in recipes:
        (tmp_path / "cache/objects" / recipe_key(recipe)[:2]).mkdir(exist_ok=True)
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(StoreUnavailableError, match="disk is full"):
        store.write_many([NewRecord(recipe_key(recipe), torch.ones(2), recipe) for recipe in recipes[1:]])
    monkeypatch.undo()
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    for key in store.keys():  # noqa: SIM118  # a store is no dict
        store.read(key)
    assert len(list(store.keys())) == (4 if call == "replace" else 1)
