"""Gather loose records into packs; whatever ends the process, every record stays readable.

A pack is written and synced, then an index that names it is published, then the loose records go: into the trash first,
from where they come back when they turn out to be other than the packed ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dittocache.embeddings.store.local import LocalRecords
from dittocache.embeddings.store.loose import LooseFile, OpenRecord, read_bytes
from dittocache.embeddings.store.maintenance import Maintenance, maintenance, put_back, to_trash
from dittocache.embeddings.store.pack_file import PackDamagedError, Packed, read_places, write_pack
from dittocache.embeddings.store.pack_index import PackIndex, Place
from dittocache.embeddings.store.record import parse_header, verify
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import RecordCorruptError
from dittocache.events import EventLog, Progress

PACK_BYTES = 256_000_000
MOST_RECORDS = 50_000  # in a pack; keeps its header far below the limit of safetensors
_INDEX_SHARE = 8  # an index is published once packs of so many times its length wait for it


@dataclass
class PackResult:
    """What packing did: counts, bytes, and the keys of records that were found to be corrupt."""

    packs: int = 0
    records: int = 0
    bytes_packed: int = 0
    duplicates_removed: int = 0
    packs_adopted: int = 0
    corrupt: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """The result in a few lines for a terminal."""
        lines = [f"{self.records} records ({self.bytes_packed / 1e6:.1f} MB) went into {self.packs} packs"]
        if self.packs_adopted:
            lines.append(f"{self.packs_adopted} packs of an interrupted run were taken over")
        if self.duplicates_removed:
            lines.append(f"{self.duplicates_removed} loose records that were packed already are removed")
        if self.corrupt:
            lines.append(f"{len(self.corrupt)} corrupt records were moved to quarantine; caching again makes them anew")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Source:
    """A loose record that is being packed, and its file as it was when it was read."""

    packed: Packed
    status: os.stat_result


def pack_records(store: Store, *, pack_bytes: int = PACK_BYTES, log: EventLog | None = None) -> PackResult:
    """Pack all loose records of a local store, the oldest first, each verified before.

    Args:
        pack_bytes: a pack is closed once it has as many.
        log: receives progress in records.

    May be stopped at any moment, and may go on beside readers, writers and caching runs. Raises CacheError while
    another process packs or removes records; StoreUnavailableError when the folder cannot be written, with all records
    where they were or in packs already.
    """
    result = PackResult()
    records = store.local
    with unavailable(f"the store {store.root} cannot be packed"), maintenance(records) as held:
        result.packs_adopted = adopt_packs(records)
        run = _Packer(store, held, result)
        waiting = sorted(records.loose.files(), key=lambda file: (file.modified, file.key))
        progress = None if log is None else Progress(log, len(waiting))
        for group in _groups(waiting, pack_bytes):
            held.touch()
            run.pack(group)
            if progress is not None:
                progress.advance(len(group))
        run.finish()
    return result


class _Packer:
    def __init__(self, store: Store, held: Maintenance, result: PackResult) -> None:
        self._store = store
        self._records = store.local
        self._held = held
        self._result = result
        self._index: PackIndex = self._records.packed.snapshot.index
        # Loose files whose records are in packs that the published index does not name yet, as they were when read.
        self._written: dict[str, os.stat_result] = {}
        self._packs: dict[str, int] = {}
        self._places: list[tuple[str, Place]] = []

    def pack(self, group: list[LooseFile]) -> None:
        """Write one pack of these records; those that are packed already only go."""
        sources = []
        for file in group:
            if self._is_packed(file.key):
                self._result.duplicates_removed += self._remove(file.key, None)
            elif (source := self._read(file.key)) is not None:
                sources.append(source)
        if not sources:
            return
        name, length, places = write_pack(self._records.packed.folder, [source.packed for source in sources])
        self._records.packed.set_age(name, max(source.status.st_mtime_ns for source in sources))
        self._packs[name] = length
        self._places += places
        self._written |= {source.packed.header.key: source.status for source in sources}
        self._result.packs += 1
        self._result.records += len(sources)
        self._result.bytes_packed += sum(len(source.packed.content) for source in sources)
        if sum(self._packs.values()) >= _INDEX_SHARE * self._index.file_bytes:
            self.finish()

    def finish(self) -> None:
        """Publish what was written, then remove the loose records."""
        if not self._written:
            return
        self._index = self._index.with_packs(self._packs, self._places)
        self._records.packed.publish(self._index)
        for key, status in self._written.items():
            self._remove(key, status)
        self._written, self._packs, self._places = {}, {}, []

    def _is_packed(self, key: str) -> bool:
        place = self._records.packed.find(key)
        return place is not None and bool(self._records.packed.sizes([key]))

    def _read(self, key: str) -> _Source | None:
        """The verified record, or None when it is gone or was found corrupt."""
        try:
            with self._records.loose.opened(key) as record:
                status = os.fstat(record.descriptor)
                try:
                    return _Source(verified(record, key), status)
                except RecordCorruptError:
                    self._records.quarantine(key, record)
                    self._result.corrupt.append(key)
        except FileNotFoundError:
            pass
        return None

    def _remove(self, key: str, packed_from: os.stat_result | None) -> int:
        """Remove a loose record whose packed copy counts; 1 if it was."""
        trashed = to_trash(self._records, key)
        if trashed is None:
            return 0
        replaced = packed_from is not None and not _is_same(trashed, packed_from)
        self._records.packed.refresh()
        # Put back what was replaced meanwhile, or whose packed copy was found corrupt meanwhile.
        if replaced or self._records.packed.find(key) is None:
            put_back(self._records, trashed)
            return 0
        trashed.unlink(missing_ok=True)
        return 1


def adopt_packs(records: LocalRecords) -> int:
    """Publish whole packs that a killed process did not come to publish, and an index that was rebuilt.

    Returns how many packs that were. Only for who holds the maintenance.
    """
    packed = records.packed
    packed.refresh()
    index = packed.snapshot.index
    found: dict[str, int] = {}
    places: list[tuple[str, Place]] = []
    for name in packed.names():
        if name in index.packs:
            continue
        try:
            inside, length = read_places(packed.path(name), name)
        except PackDamagedError:
            continue  # `verify` reports it; a packer removes loose records only after their pack was published
        unknown = [
            (key, place)
            for key, place in inside
            if index.find(key) is None and (key, name) not in packed.snapshot.dropped
        ]
        if unknown:
            found[name] = length
            places += unknown
        else:  # another copy of records that are in other packs
            packed.path(name).unlink(missing_ok=True)
    if found or packed.snapshot.rebuilt:
        packed.publish(index.with_packs(found, places))
    return len(found)


def verified(record: OpenRecord, key: str) -> Packed:
    """The record, after every byte of it was proven; raises RecordCorruptError."""
    return proven(read_bytes(record), key)


def proven(content: memoryview, key: str) -> Packed:
    """The same of bytes that were read already."""
    header = parse_header(content, len(content))
    verify(header, key, content[header.begin :])
    return Packed(header, content)


def _is_same(path: Path, status: os.stat_result) -> bool:
    found = path.stat()
    return os.path.samestat(found, status) and found.st_mtime_ns == status.st_mtime_ns


def _groups(files: Iterable[LooseFile], pack_bytes: int) -> Iterator[list[LooseFile]]:
    group: list[LooseFile] = []
    length = 0
    for file in files:
        if group and (length + file.length > pack_bytes or len(group) >= MOST_RECORDS):
            yield group
            group, length = [], 0
        group.append(file)
        length += file.length
    if group:
        yield group
