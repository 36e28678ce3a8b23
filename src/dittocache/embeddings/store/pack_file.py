"""One pack as a file: a safetensors file in which every record lies byte for byte as it was loose.

Of each record it shows the safetensors header as a U8 tensor `KEY.header`, then the record's tensors in their own
dtypes, `KEY` and where there are companions `KEY.scale` and `KEY.rows`, then bytes up to a multiple of 8 as
`KEY.padding`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dittocache.embeddings.store import writer_id
from dittocache.embeddings.store.durable import sync_folder
from dittocache.embeddings.store.loose import SUFFIX, is_key
from dittocache.embeddings.store.pack_index import Place
from dittocache.embeddings.store.record import LENGTH_BYTES, Header
from dittocache.errors import CacheError

FORMAT = "dittocache-pack-1"
ALIGNMENT = 8  # of records in a pack; safetensors aligns tensors in a record alike
LARGEST_HEADER_BYTES = 100_000_000  # the limit of safetensors
_PADDING = b"\0" * ALIGNMENT


class PackDamagedError(CacheError):
    """A pack's header cannot be read, or promises other bytes than the file has."""


@dataclass(frozen=True)
class Packed:
    """A verified record on its way into a pack: its header and all of its bytes."""

    header: Header
    content: memoryview


def write_pack(folder: Path, records: Sequence[Packed]) -> tuple[str, int, list[tuple[str, Place]]]:
    """Write a pack, durably; returns its name, its length in bytes and where each record is.

    The file has a temporary name until all of its bytes are on the disk. Raises OSError, leaving nothing behind.
    """
    name = secrets.token_hex(16)
    head, offsets = _head(records)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}{SUFFIX}"
    temporary = folder / f".{name}.{writer_id.current()}.{secrets.token_hex(4)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write_all(descriptor, memoryview(head))
            for record in records:
                _write_all(descriptor, record.content)
                _write_all(descriptor, memoryview(_PADDING)[: -len(record.content) % ALIGNMENT])
            os.fsync(descriptor)
            length = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    places = [
        (record.header.key, Place(name, len(head) + offset, len(record.content)))
        for record, offset in zip(records, offsets, strict=True)
    ]
    return name, length, places


def read_places(path: Path, name: str) -> tuple[list[tuple[str, Place]], int]:
    """Where each record of a pack is, by the pack's own header, and the length of the file.

    Raises PackDamagedError when the header is not a pack's, or the file is shorter or longer than it says; OSError.
    """
    with path.open("rb") as stream:
        length = os.fstat(stream.fileno()).st_size
        header_bytes = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if not 2 <= header_bytes <= min(LARGEST_HEADER_BYTES, length - LENGTH_BYTES):
            raise PackDamagedError(f"the pack {path} does not begin with the length of a header; it is torn or no pack")
        text = stream.read(header_bytes)
    start = LENGTH_BYTES + header_bytes
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    try:
        entries = json.loads(text)
        form = entries.pop("__metadata__")["format"]
        last = 0
        for tensor, entry in entries.items():
            key, _, part = tensor.partition(".")
            begin, end = entry["data_offsets"]
            if not is_key(key) or type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
                raise ValueError(f"{tensor!r} at {entry!r} is no part of a record")
            last = max(last, end)
            if part == "header":
                begins[key] = begin
            elif part != "padding":
                ends[key] = max(end, ends.get(key, 0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackDamagedError(f"the header of the pack {path} cannot be read ({error!r})") from error
    if form != FORMAT or begins.keys() != ends.keys() or any(ends[key] <= begins[key] for key in begins):
        raise PackDamagedError(f"{path} is no pack of the form {FORMAT!r}, or its header is damaged")
    if start + last != length:
        raise PackDamagedError(
            f"the pack {path} is {length} bytes long, its header promises {start + last}: it is torn"
        )
    return [(key, Place(name, start + begin, ends[key] - begin)) for key, begin in begins.items()], length


def _head(records: Sequence[Packed]) -> tuple[bytes, list[int]]:
    """The pack's header, its length in front, and the offset of each record behind it."""
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    offsets, offset = [], 0
    for record in records:
        header, key = record.header, record.header.key
        offsets.append(offset)
        entries[f"{key}.header"] = _entry("U8", (header.begin,), offset, offset + header.begin)
        for part in header.parts:
            companion = part.name.removeprefix(header.name)  # `.scale`, `.rows`, or nothing
            entries[key + companion] = _entry(part.dtype, part.shape, offset + part.begin, offset + part.end)
        offset += header.end
        if padding := -header.end % ALIGNMENT:
            entries[f"{key}.padding"] = _entry("U8", (padding,), offset, offset + padding)
            offset += padding
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, offsets


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
