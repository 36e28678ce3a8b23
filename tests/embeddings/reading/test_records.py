"""A record is the right tensor or an error, in whatever form it is stored, the first time and every later time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.embeddings.reading.records_on_disk import FORMS, flips, path_of, write

from dittocache.embeddings.reading import records
from dittocache.embeddings.reading.records import RecordReader
from dittocache.embeddings.store.store import Store
from dittocache.errors import RecordCorruptError, RecordMissingError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def embeds(rows: int = 6, width: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quarantined(store: Store) -> int:
    return len(list((Path(store.root) / "quarantine").glob("*")))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_stored_form_comes_back_as_the_store_gives_it(store: Store, form: str, dtype: torch.dtype) -> None:
    key = write(store, "prompt_embeds", embeds(dtype=dtype), FORMS[form])
    reader = RecordReader(store)
    for _ in range(2):
        found = reader.read(key)
        assert found.dtype == dtype
        assert torch.equal(found, store.read(key))
    target = torch.full((6, 32), 7, dtype=dtype)
    reader.read_into(target, key, reader.form(key))
    assert torch.equal(target, store.read(key))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 3, dtype=torch.bfloat16),
        torch.tensor([True, False, True]),
        torch.arange(5, dtype=torch.int32).view(1, 5),
        torch.arange(3 * records.CHUNK_BYTES // 4 + 3, dtype=torch.int32),
        torch.arange(records.CHUNK_BYTES, dtype=torch.int64).to(torch.uint8),
    ],
    ids=["scalar", "empty", "bool", "int32", "several chunks", "one chunk"],
)
def test_shapes_and_lengths_at_the_edges(store: Store, tensor: torch.Tensor) -> None:
    key = write(store, "image_latents", tensor)
    reader = RecordReader(store)
    for _ in range(2):
        assert torch.equal(reader.read(key), tensor)
        assert reader.form(key).shape == tuple(tensor.shape)


def test_rows_shared_with_another_record(store: Store) -> None:
    empty = embeds(8)
    prompt = torch.cat([empty[:6], embeds(4, seed=1)])
    base = write(store, "empty_prompt_embeds", empty)
    key = write(store, "prompt_embeds", prompt, {"rows_shared_with": base})
    reader = RecordReader(store)
    assert reader.form(key).base_key == base
    assert torch.equal(reader.read(key), prompt)
    asked = []

    def known(wanted: str) -> torch.Tensor:
        asked.append(wanted)
        return empty

    target = torch.empty(10, 32)
    reader.read_into(target, key, reader.form(key), known)
    assert torch.equal(target, prompt)
    assert asked == [base]
    path_of(store, base).unlink()
    with pytest.raises(RecordMissingError, match="shares rows with"):
        reader.read(key)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seen_before", [False, True])
def test_one_flipped_bit_is_an_error_and_the_record_goes_to_quarantine(
    store: Store, form: str, seen_before: bool
) -> None:
    key = write(store, "prompt_embeds", embeds(), FORMS[form])
    expected = store.read(key)
    path, content = path_of(store, key), path_of(store, key).read_bytes()
    for number, damaged in enumerate(flips(content)):
        path.write_bytes(content)
        reader = RecordReader(store)
        if seen_before:
            assert torch.equal(reader.read(key), expected)
        path.write_bytes(damaged)
        with pytest.raises(RecordCorruptError):
            reader.read(key)
        assert quarantined(store) == number + 1
        with pytest.raises(RecordMissingError):
            reader.read(key)
        path.write_bytes(content)
        assert torch.equal(reader.read(key), expected)


@pytest.mark.parametrize("cut", [0, 4, 200, -1, "longer"])
def test_a_record_of_another_length_is_an_error(store: Store, cut: int | str) -> None:
    key = write(store, "prompt_embeds", embeds())
    path, content = path_of(store, key), path_of(store, key).read_bytes()
    for seen_before in (False, True):
        path.write_bytes(content)
        reader = RecordReader(store)
        if seen_before:
            reader.read(key)
        path.write_bytes(content + b"\0" if isinstance(cut, str) else content[:cut])
        with pytest.raises(RecordCorruptError):
            reader.read(key)


def test_a_record_under_another_records_name_is_an_error(store: Store) -> None:
    one, other = write(store, "prompt_embeds", embeds(), number=1), write(store, "prompt_embeds", embeds(), number=2)
    reader = RecordReader(store)
    reader.read(one)
    path_of(store, one).write_bytes(path_of(store, other).read_bytes())
    with pytest.raises(RecordCorruptError, match="renamed or exchanged"):
        reader.read(one)


def test_a_record_that_was_encoded_again_with_another_result_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs do not give the same bits twice; the key is the same."""
    key = write(store, "prompt_embeds", embeds())
    reader = RecordReader(store)
    reader.read(key)
    path_of(store, key).unlink()
    assert write(store, "prompt_embeds", embeds(seed=1)) == key
    assert torch.equal(reader.read(key), embeds(seed=1))
    target = torch.empty(6, 32)
    reader.read_into(target, key, reader.form(key))
    assert torch.equal(target, embeds(seed=1))
    path_of(store, key).unlink()
    write(store, "prompt_embeds", embeds(seed=2))
    reader.read_into(target, key, reader.form(key))
    assert torch.equal(target, embeds(seed=2))
    reader.form(key)
    monkeypatch.setattr(Store, "read", lambda *_: pytest.fail("read by the store"))
    reader.read_into(target, key, reader.form(key))


def test_rows_whose_base_was_encoded_again_with_another_result_are_an_error(store: Store) -> None:
    empty = embeds(8)
    base = write(store, "empty_prompt_embeds", empty)
    key = write(store, "prompt_embeds", torch.cat([empty, embeds(4, seed=1)]), {"rows_shared_with": base})
    reader = RecordReader(store)
    reader.read(key)
    path_of(store, base).unlink()
    write(store, "empty_prompt_embeds", embeds(8, seed=2))
    with pytest.raises(RecordCorruptError, match="moved to"):
        reader.read(key)
    assert quarantined(store) == 1


def test_a_record_that_changed_its_shape_under_a_reader_is_an_error(store: Store) -> None:
    key = write(store, "prompt_embeds", embeds())
    reader = RecordReader(store)
    form = reader.form(key)
    path_of(store, key).unlink()
    write(store, "prompt_embeds", embeds(9))
    with pytest.raises(RecordCorruptError, match=r"it held torch.float32 \[6, 32\] and now holds torch.float32 \[9"):
        reader.read_into(torch.empty(6, 32), key, form)
    assert reader.read(key).shape == (9, 32)


def test_a_header_is_parsed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [write(store, "prompt_embeds", embeds(), form) for form in FORMS.values()]
    parsed: list[int] = []
    real = records.parse_header
    monkeypatch.setattr(records, "parse_header", lambda *words: parsed.append(1) or real(*words))
    monkeypatch.setattr(Store, "read", lambda *_: pytest.fail("read by the store"))
    reader = RecordReader(store)
    for _ in range(3):
        for key in keys:
            reader.read(key)
            reader.form(key)
    assert len(parsed) == len(keys)


def test_only_so_many_headers_are_remembered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REMEMBERED", 3)
    keys = [write(store, "img_shapes", torch.tensor([number]), number=number) for number in range(7)]
    reader = RecordReader(store)
    for key, number in zip(keys, range(7), strict=True):
        assert reader.read(key).item() == number
    assert list(reader._forms) == keys[-3:]
    assert reader.read(keys[0]).item() == 0


@pytest.mark.parametrize("most", [1, 100, 5000])
def test_reads_that_give_less_than_was_asked_for_are_gone_on_with(
    store: Store, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    tensor = torch.arange(2000 if most == 1 else 300_000, dtype=torch.int32)
    key = write(store, "image_latents", tensor)
    monkeypatch.setattr(os, "preadv", _at_most(most, os.preadv))
    reader = RecordReader(store)
    reader.form(key)
    monkeypatch.setattr(Store, "read", lambda *_: pytest.fail("read by the store"))
    assert torch.equal(reader.read(key), tensor)


def _at_most(most: int, real: Callable[..., int]) -> Callable[..., int]:
    def preadv(descriptor: int, parts: Sequence[Any], place: int, *flags: int) -> int:
        return real(descriptor, [memoryview(parts[0])[:most]], place, *flags)

    return preadv


def test_a_forked_process_reads_with_a_store_of_its_own(store: Store) -> None:
    key = write(store, "prompt_embeds", embeds())
    reader = RecordReader(store)
    reader.read(key)
    child = os.fork()
    if child == 0:
        alike = torch.equal(reader.read(key), embeds()) and reader.store is not store
        os._exit(0 if alike else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.store is store


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system does not tell what is in memory")
@pytest.mark.parametrize("refusal, announced", [(BlockingIOError, 1), (OSError, 0), (None, 0)])
def test_a_long_record_that_is_not_in_memory_is_announced(
    store: Store, monkeypatch: pytest.MonkeyPatch, refusal: type[OSError] | None, announced: int
) -> None:
    tensor = torch.arange(records.LONG_BYTES // 4 + 1, dtype=torch.int32)
    key, short = write(store, "image_latents", tensor), write(store, "img_shapes", tensor[:100])
    real = os.preadv

    def preadv(descriptor: int, parts: Sequence[Any], place: int, *flags: int) -> int:
        if flags and refusal is not None:
            raise refusal
        return real(descriptor, parts, place, *flags)

    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *words: told.append(words))
    reader = RecordReader(store)
    assert torch.equal(reader.read(key), tensor)
    assert torch.equal(reader.read(short), tensor[:100])
    assert told == [(0, path_of(store, key).stat().st_size, os.POSIX_FADV_WILLNEED)] * announced


def test_records_behind_a_url_are_verified_and_their_headers_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("memory://reading")
    key = write(store, "prompt_embeds", embeds(), FORMS["fp8"])
    expected = store.read(key)
    asked: list[str] = []
    real = type(store).header
    monkeypatch.setattr(type(store), "header", lambda self, wanted: asked.append(wanted) or real(self, wanted))
    reader = RecordReader(store)
    for _ in range(3):
        target = torch.empty(6, 32)
        reader.read_into(target, key, reader.form(key))
        assert torch.equal(target, expected)
        assert torch.equal(reader.read(key), expected)
    assert asked == [key]
