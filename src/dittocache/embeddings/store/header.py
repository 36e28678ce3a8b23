"""A record's header: what it says, checked for sense, before anything is proven. README.md specifies the format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dittocache.embeddings.recipe import Recipe, canonical_json, canonical_key
from dittocache.embeddings.store.forms import ROWS, SCALE
from dittocache.errors import RecordCorruptError

FORMAT = "dittocache-2"
LENGTH_BYTES = 8  # safetensors: the header's length, little-endian
ALIGNMENT = 8  # of the tensors' beginning, by spaces behind the header
LARGEST_HEADER_BYTES = 1_000_000
MOST_DIMENSIONS = 16
MOST_ELEMENTS = 1 << 48
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a record: its name, dtype, shape, and offsets from the start of the record."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a record's header says; sane in itself, but nothing is proven before `verify`.

    Attributes:
        name: the artifact.
        dtype, shape: of the tensor as the encoder made it, and as `restore` gives it.
        begin, end: offsets of all tensors' bytes from the start of the record; `end` is the record's length.
        parts: the stored tensors, in the order of their names.
        key, checksum, recipe_json, restores_json, provenance_json: from the metadata; the last two may be None.
        restored_digest: xxh3_64 of the restored bytes, where they depend on a base record.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    parts: tuple[Part, ...]
    key: str
    checksum: str
    recipe_json: str
    restores_json: str | None
    provenance_json: str | None
    restored_digest: str | None

    @property
    def recipe(self) -> Recipe:
        """The recipe as an object; raises RecordCorruptError when it does not belong to the key."""
        try:
            belongs = canonical_key(self.recipe_json) == self.key
            recipe = json.loads(self.recipe_json)
        except (ValueError, RecursionError) as error:
            raise RecordCorruptError(f"the recipe in the record's header cannot be read ({error})") from error
        if not belongs or not isinstance(recipe, dict):
            raise RecordCorruptError("the recipe in the record's header does not belong to its key")
        return recipe

    @property
    def provenance(self) -> dict[str, Any]:
        """How the record came about, as far as its recipe does not say; raises RecordCorruptError."""
        try:
            provenance = json.loads(self.provenance_json or "{}")
        except (ValueError, RecursionError) as error:
            raise RecordCorruptError(f"the provenance in the record's header cannot be read ({error})") from error
        if not isinstance(provenance, dict):
            raise RecordCorruptError("the provenance in the record's header is no JSON object")
        return provenance

    @property
    def is_plain(self) -> bool:
        """Whether the bytes from `begin` to `end` are the tensor's own: nothing is to be restored."""
        return self.restores_json is None

    @property
    def needs_base(self) -> bool:
        """Whether some rows are in another record, the one that the recipe's `rows_shared_with` names."""
        return any(part.name == f"{self.name}.{ROWS}" for part in self.parts)

    @property
    def meaning(self) -> bytes:
        """What the checksum covers before the bytes of `parts`: a wrong dtype is as bad as a flipped bit."""
        tensors = [(part.name, part.dtype, part.shape) for part in self.parts]
        return meaning_of(tensors, self.restores_json, self.provenance_json)


def header_length(start: bytes | memoryview) -> int:
    """Length of the header in bytes, from the record's first eight; raises RecordCorruptError when it cannot be."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= LARGEST_HEADER_BYTES:
        raise RecordCorruptError("the record does not begin with the length of a header; it is torn or no record")
    return length


def parse_header(content: bytes | memoryview, record_bytes: int) -> Header:
    """The header at the beginning of `content`, checked against the length of the whole record.

    Raises RecordCorruptError when the header is not whole, not ours, or promises another length.
    """
    length = header_length(content)
    begin = LENGTH_BYTES + length
    try:
        fields = json.loads(bytes(content[LENGTH_BYTES:begin]))
        metadata = fields.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise RecordCorruptError(f"the record's format is {metadata['format']!r}; expected {FORMAT!r}")
        parts = [_part(name, entry, begin) for name, entry in sorted(fields.items())]
        texts = metadata["key"], metadata["checksum"], metadata["recipe"]
        restores_json, provenance_json = metadata.get("restores"), metadata.get("provenance")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("key, checksum and recipe must be texts")
        if not all(text is None or isinstance(text, str) for text in (restores_json, provenance_json)):
            raise ValueError("restores and provenance must be texts")
        main = _main_part(parts)
        dtype, shape, digest = main.dtype, main.shape, None
        if restores_json is not None:
            restores = json.loads(restores_json)
            dtype, shape, digest = restores["dtype"], _shape(restores["shape"]), restores.get("digest")
            DTYPES[dtype]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordCorruptError(f"the record's header cannot be read ({error!r})") from error
    _check_offsets(parts, begin, record_bytes)
    return Header(
        name=main.name,
        dtype=dtype,
        shape=shape,
        begin=begin,
        end=record_bytes,
        parts=tuple(parts),
        key=texts[0],
        checksum=texts[1],
        recipe_json=texts[2],
        restores_json=restores_json,
        provenance_json=provenance_json,
        restored_digest=digest,
    )


def meaning_of(tensors: list[tuple[str, str, tuple[int, ...]]], restores: str | None, provenance: str | None) -> bytes:
    """What the checksum covers before the bytes: of each tensor, by name, its name, dtype and shape; then the rest."""
    return canonical_json([FORMAT, tensors, restores, provenance]).encode()


def _part(name: str, entry: Mapping[str, Any], begin: int) -> Part:
    first, last = (_natural(offset) for offset in entry["data_offsets"])
    shape = _shape(entry["shape"])
    if last - first != math.prod(shape) * DTYPES[entry["dtype"]].itemsize:
        raise ValueError(f"{name!r} has {last - first} bytes, not those of {entry['dtype']} {list(shape)}")
    return Part(name, entry["dtype"], shape, begin + first, begin + last)


def _main_part(parts: list[Part]) -> Part:
    """The artifact's tensor: the one that all others are named after."""
    main = min(parts, key=lambda part: len(part.name))
    allowed = {main.name, f"{main.name}.{SCALE}", f"{main.name}.{ROWS}"}
    if any(part.name not in allowed for part in parts):
        raise ValueError(f"found tensors {[part.name for part in parts]}; expected an artifact and its companions")
    return main


def _check_offsets(parts: list[Part], begin: int, record_bytes: int) -> None:
    place = begin
    for part in sorted(parts, key=lambda part: (part.begin, part.end)):
        if part.begin != place:
            raise RecordCorruptError(f"the record's tensors overlap or leave a gap at byte {place}")
        place = part.end
    if place != record_bytes:
        raise RecordCorruptError(
            f"the record is {record_bytes} bytes long; its header promises {place} with tensors of "
            f"{[f'{part.dtype} {list(part.shape)}' for part in parts]}: it is torn"
        )


def _shape(sides: Any) -> tuple[int, ...]:
    if not isinstance(sides, list) or len(sides) > MOST_DIMENSIONS:
        raise ValueError(f"a shape must be a list of at most {MOST_DIMENSIONS} sides")
    shape = tuple(_natural(side) for side in sides)
    if math.prod(max(1, side) for side in shape) > MOST_ELEMENTS:
        raise ValueError("a shape of more elements than any tensor has")
    return shape


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no natural number")
    return value
