"""One record as bytes: a safetensors file of one tensor that can prove itself. README.md specifies the format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from xxhash import xxh3_64

from dittocache.embeddings.recipe import Recipe, canonical_json, canonical_key, recipe_key
from dittocache.errors import CacheError, RecordCorruptError

FORMAT = "dittocache-1"
LENGTH_BYTES = 8  # safetensors: the header's length, little-endian
LARGEST_HEADER_BYTES = 1_000_000
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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """What a record's header says; sane in itself, but nothing is proven before `unpack`.

    Attributes:
        name: the tensor's name: its artifact.
        dtype, shape: of the tensor.
        begin, end: offsets of its bytes from the start of the record; `end` is the record's length.
        key, checksum, recipe_json: from the metadata.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    key: str
    checksum: str
    recipe_json: str

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


def pack(key: str, tensor: torch.Tensor, recipe: Mapping[str, Any]) -> bytes:
    """The record of a tensor of any shape, in its own dtype.

    Raises CacheError when the key is not the recipe's, or the dtype has no place in the format.
    """
    if recipe_key(recipe) != key:
        raise CacheError(f"key {key} does not belong to this recipe; expected {recipe_key(recipe)} (recipe_key)")
    if tensor.dtype not in _DTYPE_NAMES:
        raise CacheError(f"a tensor of dtype {tensor.dtype} cannot be stored; expected one of {list(_DTYPE_NAMES)}")
    stored = tensor.detach().to("cpu").contiguous()
    name = str(recipe["artifact"])
    checksum = _checksum(name, _DTYPE_NAMES[stored.dtype], tuple(stored.shape), _bytes_of(stored))
    metadata = {"format": FORMAT, "key": key, "checksum": checksum, "recipe": canonical_json(recipe)}
    return bytes(save({name: stored}, metadata))


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
        [(name, entry)] = fields.items()
        shape = tuple(_natural(side) for side in entry["shape"])
        first, last = (_natural(offset) for offset in entry["data_offsets"])
        dtype = entry["dtype"]
        itemsize = DTYPES[dtype].itemsize
        found = metadata["format"], metadata["key"], metadata["checksum"], metadata["recipe"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordCorruptError(f"the record's header cannot be read ({error!r})") from error
    if found[0] != FORMAT or not all(isinstance(text, str) for text in found):
        raise RecordCorruptError(f"the record's format is {found[0]!r}; expected {FORMAT!r}")
    if first != 0 or last != math.prod(shape) * itemsize or begin + last != record_bytes:
        raise RecordCorruptError(
            f"the record is {record_bytes} bytes long; its header promises {begin + last} with a {dtype} tensor of "
            f"shape {list(shape)}: it is torn"
        )
    return Header(name, dtype, shape, begin, begin + last, found[1], found[2], found[3])


def unpack(content: bytearray | memoryview, key: str) -> torch.Tensor:
    """The tensor of a whole record; it shares memory with `content`, which must be writable.

    Raises RecordCorruptError unless header, recipe, key and every byte of the tensor agree.
    """
    view = memoryview(content)
    header = parse_header(view, len(view))
    if header.key != key:
        raise RecordCorruptError(f"the record holds key {header.key}; expected {key}: it was renamed or exchanged")
    if str(header.recipe.get("artifact")) != header.name:
        raise RecordCorruptError(f"the record's tensor is called {header.name!r}; its recipe is for another artifact")
    if _checksum(header.name, header.dtype, header.shape, view[header.begin : header.end]) != header.checksum:
        raise RecordCorruptError("the record's bytes do not match its checksum")
    dtype = DTYPES[header.dtype]
    if header.begin == header.end:
        return torch.empty(header.shape, dtype=dtype)
    return torch.frombuffer(view[header.begin : header.end], dtype=dtype).view(header.shape)


def _checksum(name: str, dtype: str, shape: tuple[int, ...], content: memoryview) -> str:
    """xxh3 of what gives the bytes their meaning and of the bytes: a flipped dtype is as wrong as a flipped bit."""
    hasher = xxh3_64(canonical_json([FORMAT, name, dtype, list(shape)]).encode())
    hasher.update(content)
    return hasher.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no natural number")
    return value
