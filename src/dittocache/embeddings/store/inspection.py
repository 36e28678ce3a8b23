"""What is in a store: one record in full, or all of them in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dittocache.embeddings.store.loose import is_key
from dittocache.embeddings.store.packing import proven
from dittocache.embeddings.store.record import Header, parse_header
from dittocache.embeddings.store.roots import roots, split
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import CacheError, RecordCorruptError
from dittocache.events import EventLog, Progress


def inspect(store: Store, what: str | Path) -> dict[str, Any]:
    """Everything about one record, as JSON values; nothing is moved, whatever is wrong with it.

    Args:
        what: a key, or the file of a record, for example one in quarantine.

    Raises RecordMissingError; RecordCorruptError when not even the header can be read; CacheError for what is neither a
    key nor a file.
    """
    key = str(what)
    if is_key(key):
        content = memoryview(bytearray(store.fetch(key)))
        where = _where(store, key)
    else:
        with unavailable(f"{what} cannot be read"):
            path = Path(what)
            if not path.is_file():
                raise CacheError(f"{str(what)!r} is neither a key of 32 hex digits nor a record's file")
            content = memoryview(bytearray(path.read_bytes()))
        where = {"place": "file", "path": str(path)}
        key = parse_header(content, len(content)).key
    header = parse_header(content, len(content))
    try:
        proven(content, key)
        state = "matches"
    except RecordCorruptError as error:
        state = f"does not match: {error}"
    return {**_of_header(header), **where, "checksum": state, "used_by": _used_by(store, key)}


def _of_header(header: Header) -> dict[str, Any]:
    return {
        "key": header.key,
        "artifact": header.name,
        "dtype": header.dtype,
        "shape": list(header.shape),
        "bytes": header.end,
        "stored": {part.name: {"dtype": part.dtype, "shape": list(part.shape)} for part in header.parts},
        "recipe": header.recipe,
        "provenance": header.provenance,
    }


def _where(store: Store, key: str) -> dict[str, Any]:
    if not store.is_local:
        return {"place": "remote", "path": str(store.location)}
    with store.opened(key) as record:
        if record.pack is None:
            return {"place": "loose", "path": str(store.local.loose.path(key))}
        return {"place": "pack", "path": str(store.local.packed.path(record.pack)), "offset": record.offset}


def _used_by(store: Store, key: str) -> list[str]:
    if not store.is_local:
        return []
    wanted = bytes.fromhex(key)
    return [str(root.manifest) for root in roots(store) if wanted in split(root.keys)]


@dataclass
class StoreStatistics:
    """Records and bytes of a store.

    Attributes:
        loose, packed: records, and `loose_bytes`, `packed_bytes` of them.
        packs: files.
        records, bytes: by (artifact, family, encoder); `unreadable` for what has no header.
    """

    loose: int = 0
    loose_bytes: int = 0
    packed: int = 0
    packed_bytes: int = 0
    packs: int = 0
    records: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def describe(self) -> str:
        """The numbers in a few lines for a terminal."""
        lines = [
            f"{self.loose} loose records ({self.loose_bytes / 1e6:.1f} MB), "
            f"{self.packed} in {self.packs} packs ({self.packed_bytes / 1e6:.1f} MB)"
        ]
        lines += [
            f"  {count:>8} {' '.join(group)} ({self.bytes[group] / 1e6:.1f} MB)"
            for group, count in sorted(self.records.items())
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        groups = [
            dict(zip(("artifact", "family", "encoder"), group, strict=True))
            | {"records": count, "bytes": self.bytes[group]}
            for group, count in sorted(self.records.items())
        ]
        return {
            "loose": {"records": self.loose, "bytes": self.loose_bytes},
            "packed": {"records": self.packed, "bytes": self.packed_bytes, "packs": self.packs},
            "groups": groups,
        }


def statistics(store: Store, *, log: EventLog | None = None) -> StoreStatistics:
    """Count a local store's records; reads every header, and no tensor."""
    with unavailable(f"the store {store.root} cannot be read"):
        found = StoreStatistics()
        local = store.local
        packed = local.packed.sizes(list(local.packed.keys()))
        loose = {file.key: file.length for file in local.loose.files()}
        found.packs = len(local.packed.snapshot.index.packs)
        found.loose, found.loose_bytes = len(loose), sum(loose.values())
        found.packed, found.packed_bytes = len(packed), sum(packed.values())
        lengths = loose | packed
        progress = None if log is None else Progress(log, len(lengths))
        for key, length in lengths.items():
            group = _group(store, key)
            found.records[group] += 1
            found.bytes[group] += length
            if progress is not None:
                progress.advance()
        return found


def _group(store: Store, key: str) -> tuple[str, str, str]:
    try:
        recipe = store.recipe_of(key)
    except CacheError:
        return "unreadable", "", ""
    encoder = recipe.get("encoder")
    name = ".".join(encoder.get("class", ())) if isinstance(encoder, dict) else "no encoder"
    return str(recipe.get("artifact")), str(recipe.get("family", "")), name
