"""One record as bytes: a safetensors file of one artifact that can prove itself. README.md specifies the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from xxhash import xxh3_64

from dittocache.embeddings.recipe import Recipe, canonical_json, recipe_key
from dittocache.embeddings.store.forms import Stored, to_restored, to_stored
from dittocache.embeddings.store.header import (
    ALIGNMENT,
    DTYPE_NAMES,
    DTYPES,
    FORMAT,
    LARGEST_HEADER_BYTES,
    LENGTH_BYTES,
    Header,
    Part,
    header_length,
    meaning_of,
    parse_header,
)
from dittocache.embeddings.store.storage import ReadBase, base_key_of
from dittocache.errors import CacheError, RecordCorruptError

__all__ = [
    "DTYPES",
    "FORMAT",
    "LARGEST_HEADER_BYTES",
    "LENGTH_BYTES",
    "Header",
    "header_length",
    "pack",
    "parse_header",
    "restore",
    "unpack",
    "verify",
    "verify_header",
]


def pack(
    key: str,
    tensor: torch.Tensor,
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    base: ReadBase | None = None,
) -> bytes:
    """The record of a tensor of any shape, in the form that its recipe asks for (`storage.to_stored`).

    Args:
        provenance: JSON values that are no part of the key, such as `{"vae_tiling": true}`.
        base: gives the restored tensor of a record that rows are shared with; without it all rows are stored.

    Raises CacheError when the key is not the recipe's, the dtype has no place in the format, the form is not known, or
    recipe and provenance are longer than a header may be.
    """
    if recipe_key(recipe) != key:
        raise CacheError(f"key {key} does not belong to this recipe; expected {recipe_key(recipe)} (recipe_key)")
    if tensor.dtype not in DTYPE_NAMES:
        raise CacheError(f"a tensor of dtype {tensor.dtype} cannot be stored; expected one of {list(DTYPE_NAMES)}")
    stored = to_stored(tensor.detach().to("cpu").contiguous(), recipe, base)
    told = dict(provenance or {})
    if stored.native_because:
        told["stored_native"] = stored.native_because
    name = str(recipe["artifact"])
    tensors = {name: stored.main, **{f"{name}.{suffix}": part for suffix, part in stored.companions.items()}}
    metadata = {"format": FORMAT, "key": key, "recipe": canonical_json(recipe)}
    if stored.companions or stored.main.dtype != stored.restored_dtype:
        metadata["restores"] = _restores(stored)
    if told:
        metadata["provenance"] = canonical_json(told)
    return _safetensors(tensors, metadata)


def verify(header: Header, key: str, tensors: memoryview) -> None:
    """Prove a record: its key, its recipe, and `tensors`, the bytes from `header.begin` to `header.end`.

    Nothing is copied. Raises RecordCorruptError unless everything agrees.
    """
    verify_header(header, key)
    hasher = xxh3_64(header.meaning)
    for part in header.parts:
        hasher.update(tensors[part.begin - header.begin : part.end - header.begin])
    if len(tensors) != header.end - header.begin or hasher.hexdigest() != header.checksum:
        raise RecordCorruptError("the record's bytes do not match its checksum")


def verify_header(header: Header, key: str) -> Recipe:
    """The part of `verify` that needs no tensors; returns the recipe."""
    if header.key != key:
        raise RecordCorruptError(f"the record holds key {header.key}; expected {key}: it was renamed or exchanged")
    recipe = header.recipe
    if str(recipe.get("artifact")) != header.name:
        raise RecordCorruptError(f"the record's tensor is called {header.name!r}; its recipe is for another artifact")
    return recipe


def restore(
    header: Header, tensors: memoryview, base: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The tensor as the encoder made it, from verified bytes; `tensors`, which must be writable, may be shared.

    Args:
        base: the restored tensor of the base record; needed when `header.needs_base`.
        out: of the header's dtype and shape: the result is written there, and shares nothing.

    Raises RecordCorruptError when the parts do not fit each other, or the base is another than when this was written.
    """
    found = {
        part.name: _tensor(part, tensors[part.begin - header.begin : part.end - header.begin]) for part in header.parts
    }
    main = found.pop(header.name)
    companions = {name.removeprefix(f"{header.name}."): tensor for name, tensor in found.items()}
    return to_restored(Stored(main, companions, DTYPES[header.dtype], header.shape, header.restored_digest), base, out)


def unpack(content: bytearray | memoryview, key: str, base: ReadBase | None = None) -> torch.Tensor:
    """The tensor of a whole record; it may share memory with `content`, which must be writable.

    Args:
        base: gives the restored tensor of the record that rows are shared with.

    Raises RecordCorruptError unless header, recipe, key and every byte of the tensor agree; what `base` raises.
    """
    view = memoryview(content)
    header = parse_header(view, len(view))
    tensors = view[header.begin :]
    verify(header, key, tensors)
    if not header.needs_base:
        return restore(header, tensors)
    base_key = base_key_of(header.recipe)
    if base_key is None or base is None:
        raise RecordCorruptError("the record holds some rows only, and no base record was given to fill the others")
    return restore(header, tensors, base(base_key))


def _restores(stored: Stored) -> str:
    restores: dict[str, Any] = {
        "dtype": DTYPE_NAMES[stored.restored_dtype],
        "shape": list(stored.restored_shape),
    }
    if stored.restored_digest is not None:
        restores["digest"] = stored.restored_digest
    return canonical_json(restores)


def _safetensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The file of these tensors, with their checksum.

    Not by `safetensors.torch.save`, which puts metadata in another order every time and copies the bytes twice: one
    tensor and recipe are one record, bit for bit.
    """
    content = {name: tensor.reshape(-1).view(torch.uint8).numpy().data for name, tensor in sorted(tensors.items())}
    described = [(name, DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in content]
    hasher = xxh3_64(meaning_of(described, metadata.get("restores"), metadata.get("provenance")))
    for part in content.values():
        hasher.update(part)
    header: dict[str, Any] = {"__metadata__": {**metadata, "checksum": hasher.hexdigest()}}
    placed = sorted(described, key=lambda part: -DTYPES[part[1]].itemsize)  # wide ones first: all are aligned
    offset = 0
    for name, dtype, shape in placed:
        end = offset + len(content[name])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = canonical_json(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > LARGEST_HEADER_BYTES:
        raise CacheError(
            f"recipe and provenance make a header of {len(text)} bytes; expected at most {LARGEST_HEADER_BYTES}: "
            "describe long inputs by their digests"
        )
    return b"".join([len(text).to_bytes(LENGTH_BYTES, "little"), text, *(content[name] for name, _, _ in placed)])


def _tensor(part: Part, content: memoryview) -> torch.Tensor:
    dtype = DTYPES[part.dtype]
    if not content:
        return torch.empty(part.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(part.shape)
