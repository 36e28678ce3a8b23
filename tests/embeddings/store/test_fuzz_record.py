"""Damaged and forged records: an error of ours or the right tensor, never a crash, a hang or a wrong tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64

from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store.record import (
    DTYPES,
    LARGEST_HEADER_BYTES,
    LENGTH_BYTES,
    pack,
    parse_header,
    restore,
    unpack,
    verify,
)
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, RecordCorruptError

pytestmark = pytest.mark.timeout(60)  # a hang is a failure

BASE_RECIPE: dict[str, Any] = {"artifact": "empty_prompt_embeds", "schema": 1}
BASE_KEY = recipe_key(BASE_RECIPE)
BASE = (torch.arange(40, dtype=torch.float32).reshape(5, 8) / 7).to(torch.bfloat16)
TENSOR = torch.cat([BASE, -BASE[:2]])
FORMS: dict[str, dict[str, Any] | None] = {
    "native": None,
    "float16": {"dtype": "float16"},
    "fp8": {"dtype": "fp8_e4m3_token"},
    "rows": {"rows_shared_with": BASE_KEY},
    "fp8 rows": {"dtype": "fp8_e4m3_token", "rows_shared_with": BASE_KEY},
}


class Made:
    """A record, and what it holds."""

    def __init__(self, form: str, number: int = 0) -> None:
        recipe: dict[str, Any] = {"artifact": "prompt_embeds", "schema": 1, "number": number}
        if FORMS[form] is not None:
            recipe["storage"] = FORMS[form]
        tensor = TENSOR.float() / 3 if form == "float16" else TENSOR + number
        self.base = unpack(bytearray(pack(BASE_KEY, BASE, BASE_RECIPE)), BASE_KEY)
        if form == "fp8 rows":  # as the base's own fp8 record restores it
            fp8 = {**BASE_RECIPE, "storage": FORMS["fp8"]}
            self.base = unpack(bytearray(pack(recipe_key(fp8), BASE, fp8)), recipe_key(fp8))
        self.key = recipe_key(recipe)
        self.content = pack(self.key, tensor, recipe, {"vae_tiling": True}, base=lambda _: self.base)
        self.tensor = self.read(self.content)

    def read(self, content: bytes | bytearray) -> torch.Tensor:
        return unpack(bytearray(content), self.key, base=lambda _: self.base)

    def check(self, content: bytes | bytearray) -> None:
        """An error of ours, or the right tensor."""
        try:
            found = self.read(content)
        except RecordCorruptError:
            return
        assert found.dtype == self.tensor.dtype and torch.equal(found, self.tensor)

    def header(self) -> dict[str, Any]:
        length = int.from_bytes(self.content[:LENGTH_BYTES], "little")
        parsed: dict[str, Any] = json.loads(self.content[LENGTH_BYTES : LENGTH_BYTES + length])
        return parsed

    @property
    def payload(self) -> bytes:
        return self.content[LENGTH_BYTES + int.from_bytes(self.content[:LENGTH_BYTES], "little") :]


RECORDS = {form: Made(form) for form in FORMS}
records = st.sampled_from(list(RECORDS.values()))


def joined(header: Any, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + payload


def proven(header: dict[str, Any], payload: bytes) -> bytes:
    """A forged record whose checksum is right, where its header can be read: what a faulty writer could leave."""
    content = joined(header, payload)
    try:
        parsed = parse_header(content, len(content))
    except RecordCorruptError:
        return content
    hasher = xxh3_64(parsed.meaning)
    for part in parsed.parts:
        hasher.update(content[part.begin : part.end])
    metadata = {**header["__metadata__"], "checksum": hasher.hexdigest()}
    return joined({**header, "__metadata__": metadata}, payload)


def test_the_records_have_the_parts_that_are_fuzzed() -> None:
    parts = {form: {name for name in made.header() if name != "__metadata__"} for form, made in RECORDS.items()}
    main, scale, rows = "prompt_embeds", "prompt_embeds.scale", "prompt_embeds.rows"
    assert parts["native"] == parts["float16"] == {main}
    assert parts["fp8"] == {main, scale} and parts["rows"] == {main, rows} and parts["fp8 rows"] == {main, scale, rows}
    for made in RECORDS.values():
        assert torch.equal(made.read(proven(made.header(), made.payload)), made.tensor), "the forger can forge"


@pytest.mark.parametrize("made", RECORDS.values(), ids=RECORDS)
def test_every_flipped_bit_of_every_form_is_found(made: Made) -> None:
    for position in range(len(made.content)):
        for bit in range(8):
            damaged = bytearray(made.content)
            damaged[position] ^= 1 << bit
            with pytest.raises(RecordCorruptError):
                made.read(damaged)


@pytest.mark.parametrize("made", RECORDS.values(), ids=RECORDS)
def test_every_truncation_of_every_form_is_found(made: Made) -> None:
    for length in range(len(made.content)):
        with pytest.raises(RecordCorruptError):
            made.read(made.content[:length])


@settings(max_examples=400, deadline=None)
@given(records, st.data())
def test_bytes_flipped_inserted_and_removed_anywhere(made: Made, data: st.DataObject) -> None:
    content = bytearray(made.content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 40)))
        content[start:end] = data.draw(st.binary(max_size=40))
    made.check(content)


@settings(max_examples=100, deadline=None)
@given(records, records, st.data())
def test_two_records_spliced(made: Made, other: Made, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(made.content)))
    made.check(made.content[:cut] + other.content[data.draw(st.integers(0, len(other.content))) :])
    made.check(joined(made.header(), other.payload))
    made.check(joined(other.header(), made.payload))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64 - 1), st.binary(max_size=64))
def test_a_header_length_bomb_allocates_nothing(length: int, rest: bytes) -> None:
    with pytest.raises(RecordCorruptError):
        RECORDS["native"].read(length.to_bytes(LENGTH_BYTES, "little") + rest)


def test_a_header_that_is_too_long_is_neither_written_nor_read() -> None:
    made = RECORDS["native"]
    long = joined(json.dumps(made.header()).encode().ljust(LARGEST_HEADER_BYTES + 1), made.payload)
    with pytest.raises(RecordCorruptError, match="length of a header"):
        made.read(long)
    recipe = {**BASE_RECIPE, "transform": "x" * LARGEST_HEADER_BYTES}
    with pytest.raises(CacheError, match="header of .* bytes; expected at most"):
        pack(recipe_key(recipe), BASE, recipe)


def bombs() -> Iterator[tuple[str, bytes]]:
    room = LARGEST_HEADER_BYTES - 200
    entry = '{"dtype":"BF16","shape":%s,"data_offsets":[0,%s]}'
    metadata = json.dumps(RECORDS["native"].header()["__metadata__"])
    yield "nested lists", b"[" * room
    yield "nested objects", b'{"a":' * (room // 5)
    yield "long number", b'{"a":' + b"9" * (room // 2) + b"}"
    for name, sides, end in (
        ("many sides", [9] * (room // 4), 112),
        ("wide sides", [10**4000] * 16, 112),
        ("a zero hides the others", [0, 2**40, 2**40], 0),
        ("an end of 4,000 digits", [7, 8], 10**4000),
    ):
        text = f'{{"__metadata__":{metadata},"prompt_embeds":{entry % (json.dumps(sides), end)}}}'
        yield name, text.encode()
    for field in ("recipe", "restores", "provenance"):
        nested = {**RECORDS["fp8"].header()["__metadata__"], field: "[" * (room // 2)}
        yield f"nested {field}", json.dumps({**RECORDS["fp8"].header(), "__metadata__": nested}).encode()
    sides = {"dtype": "BF16", "shape": [2**47, 8], "digest": ""}
    huge = {**RECORDS["rows"].header()["__metadata__"], "restores": json.dumps(sides)}
    yield "restores to petabytes", json.dumps({**RECORDS["rows"].header(), "__metadata__": huge}).encode()


@pytest.mark.parametrize(("name", "text"), list(bombs()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_bomb_in_the_header_is_an_error_of_ours(name: str, text: bytes) -> None:
    for made in RECORDS.values():
        with pytest.raises(RecordCorruptError):
            made.read(joined(text, made.payload))
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            continue
        with pytest.raises(RecordCorruptError):
            content = proven(header, made.payload)
            made.read(content)
            parse_header(content, len(content)).provenance  # noqa: B018  # what only this reads is proven by bytes


@pytest.mark.parametrize("sides", ["[NaN,8]", "[Infinity]", "[7.0,8]", "[true,56]", '["7",8]', "[-7,-8]", "null", "{}"])
def test_a_shape_of_anything_but_natural_numbers(sides: str) -> None:
    made = RECORDS["native"]
    text = json.dumps(made.header()).replace("[7, 8]", sides)
    assert sides in text
    with pytest.raises(RecordCorruptError):
        made.read(joined(text.encode(), made.payload))
    with pytest.raises(RecordCorruptError):
        made.read(proven(json.loads(text), made.payload))


def test_a_shape_that_no_tensor_can_have_beside_a_zero() -> None:
    header = RECORDS["native"].header()
    header["prompt_embeds"] = {"dtype": "BF16", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}
    with pytest.raises(RecordCorruptError, match="more elements than any tensor"):
        RECORDS["native"].read(proven(header, b""))


def test_a_tensor_that_belongs_to_no_artifact_is_found() -> None:
    made = RECORDS["native"]
    end = len(made.payload)
    for name in ("prompt_embeds.more", "prompt_embeds_mask", "prompt_embeds.scale.scale"):
        header = {**made.header(), name: {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}}
        with pytest.raises(RecordCorruptError, match="expected an artifact and its companions"):
            made.read(proven(header, made.payload + b"more"))


def test_names_that_appear_twice() -> None:
    made = RECORDS["fp8"]
    fields = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in made.header().items()]
    other = json.dumps({"dtype": "U8", "shape": [56], "data_offsets": [28, 84]})
    for twice in [*fields, f'"prompt_embeds":{other}', f'"prompt_embeds.scale":{other}', f'"__metadata__":{other}']:
        made.check(joined(("{" + ",".join([*fields, twice]) + "}").encode(), made.payload))
        made.check(joined(("{" + ",".join([twice, *fields]) + "}").encode(), made.payload))


def test_gaps_and_overlaps_are_found() -> None:
    made = RECORDS["fp8"]
    (scale_begin, scale_end), (begin, end) = (
        made.header()[name]["data_offsets"] for name in ("prompt_embeds.scale", "prompt_embeds")
    )
    assert scale_begin == 0 and scale_end == begin
    for moved, payload in (
        ([begin + 8, end + 8], made.payload[:begin] + b"anything" + made.payload[begin:]),
        ([begin - 8, end - 8], made.payload[: begin - 8] + made.payload[begin:]),
        ([0, end - begin], made.payload[begin:]),
    ):
        header = made.header()
        header["prompt_embeds"]["data_offsets"] = moved
        with pytest.raises(RecordCorruptError, match="overlap or leave a gap"):
            made.read(joined(header, payload))


values = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(list(DTYPES))
)
trees = st.recursive(
    values, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
small = st.integers(0, 9)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records, st.data())
def test_a_forged_header_with_the_right_checksum_is_never_a_crash(made: Made, data: st.DataObject) -> None:
    """Dtypes exchanged, shapes and offsets moved, companions renamed, removed or swapped, anything in any field."""
    header, payload = made.header(), made.payload
    names = [name for name in header if name != "__metadata__"]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        if name not in header or not isinstance(header[name], dict):
            continue
        match data.draw(st.integers(0, 8)):
            case 0:
                header[name]["dtype"] = data.draw(st.sampled_from(list(DTYPES)))
            case 1:
                header[name]["shape"] = data.draw(st.lists(small, max_size=4))
            case 2:
                header[name]["data_offsets"] = data.draw(st.lists(st.integers(0, len(payload)), max_size=3))
            case 3:
                other = data.draw(st.sampled_from(names))
                header[name], header[other] = header.get(other), header[name]
            case 4:
                header[data.draw(st.sampled_from(["prompt_embeds.scale", "prompt_embeds.rows", "x"]))] = header.pop(
                    name
                )
            case 5:
                header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(trees)
            case 6:
                field = data.draw(st.sampled_from(["restores", "provenance", "recipe", "key", "format"]))
                header["__metadata__"][field] = data.draw(trees)
            case 7:
                shape = data.draw(st.lists(small, max_size=3))
                restores = {"dtype": data.draw(st.sampled_from(list(DTYPES))), "shape": shape, "digest": "0" * 16}
                header["__metadata__"]["restores"] = json.dumps(restores)
            case 8:
                header["__metadata__"].pop(data.draw(st.sampled_from(sorted(header["__metadata__"]))), None)
                if not header["__metadata__"]:
                    return
    content = proven(header, payload)
    try:
        found = made.read(content)
        parsed = parse_header(content, len(content))
    except RecordCorruptError:
        return
    assert (found.dtype, tuple(found.shape)) == (DTYPES[parsed.dtype], parsed.shape), (
        "what the header promises is given"
    )


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["rows", "fp8 rows"]), st.data())
def test_row_numbers_that_point_anywhere_are_never_a_crash(form: str, data: st.DataObject) -> None:
    made = RECORDS[form]
    header, payload = made.header(), bytearray(made.payload)
    begin, end = header["prompt_embeds.rows"]["data_offsets"]
    count = (end - begin) // 4
    numbers = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 8), min_size=count, max_size=count))
    payload[begin:end] = torch.tensor(numbers, dtype=torch.int32).numpy().tobytes()
    made.check(proven(header, bytes(payload)))


@pytest.mark.parametrize("part", ["prompt_embeds", "prompt_embeds.scale", "prompt_embeds.rows"])
def test_companions_of_another_record_are_found(part: str) -> None:
    made, other = RECORDS["fp8 rows"], Made("fp8", number=1)
    begin, end = made.header()[part]["data_offsets"]
    payload = made.payload[:begin] + (other.payload * 9)[: end - begin] + made.payload[end:]
    assert payload != made.payload
    with pytest.raises(RecordCorruptError, match="checksum"):
        made.read(joined(made.header(), payload))


@pytest.mark.parametrize("form", ["rows", "fp8 rows"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_other_base_is_found(form: str, data: st.DataObject) -> None:
    made = RECORDS[form]
    shape = data.draw(st.sampled_from([(5, 8), (4, 8), (7, 8), (5, 4), (0, 8), (40,), ()]))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.int32, torch.float8_e4m3fn]))
    with pytest.raises(RecordCorruptError, match="not the one"):
        unpack(bytearray(made.content), made.key, base=lambda _: torch.ones(shape).to(dtype))


def test_parts_of_a_record_are_proven_without_a_copy() -> None:
    for made in RECORDS.values():
        content = bytearray(made.content)
        header = parse_header(content, len(content))
        tensors = memoryview(content)[header.begin :]
        verify(header, made.key, tensors)
        assert torch.equal(restore(header, tensors, made.base), made.tensor)
        out = torch.empty_like(made.tensor)
        assert restore(header, tensors, made.base, out=out) is out and torch.equal(out, made.tensor)
        if header.is_plain:
            found = restore(header, tensors)
            content[-1] ^= 1
            assert not torch.equal(found, made.tensor), "the tensor is the bytes themselves"
        with pytest.raises(RecordCorruptError, match="checksum"):
            verify(header, made.key, tensors[:-1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records, st.data())
def test_whatever_is_in_a_records_place_the_store_says_so(tmp_path: Path, made: Made, data: st.DataObject) -> None:
    store = Store(tmp_path)
    path = tmp_path / "objects" / made.key[:2] / f"{made.key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = data.draw(st.integers(0, len(made.content)))
    path.write_bytes(made.content[:cut] + data.draw(st.binary(max_size=30)) + made.content[cut:][1:])
    assert set(store.sizes([made.key])) <= {made.key}
    for ask in (store.header, store.recipe_of):
        try:
            ask(made.key)
        except RecordCorruptError:
            continue
    if path.read_bytes() != made.content:
        with pytest.raises(RecordCorruptError, match="moved to"):
            store.read(made.key)
        assert made.key not in store
