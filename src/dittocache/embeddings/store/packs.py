"""Packed records: many in one safetensors file, found by the pack index, byte for byte as they were loose.

Nothing here needs a lock: the index is replaced whole, packs are never modified, and a reader whose index has become
old notices by what it cannot find, loads the new one and looks again.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dittocache.embeddings.store.durable import replace_file, sync_folder
from dittocache.embeddings.store.loose import SUFFIX, OpenRecord, is_key
from dittocache.embeddings.store.pack_file import PackDamagedError, read_places
from dittocache.embeddings.store.pack_index import IndexDamagedError, PackIndex, Place

OPEN_PACKS = 64  # files held open; macOS allows a process 256
_GONE = (errno.ENOENT, errno.ESTALE)
Stamp = tuple[int, ...]


@dataclass(frozen=True)
class Snapshot:
    """The pack index as it was loaded.

    Attributes:
        dropped: (key, pack) of entries that do not count: corrupt, or replaced by a loose record.
        stamp: of the index file, and of the folder of dropped entries; empty before anything was loaded.
        rebuilt: the index file was missing or damaged, and this one comes from the packs' headers.
    """

    index: PackIndex = field(default_factory=PackIndex.empty)
    dropped: frozenset[tuple[str, str]] = frozenset()
    stamp: tuple[Stamp, Stamp] | None = None
    rebuilt: bool = False


class PackedRecords:
    """The records in `ROOT/packs`; every method may raise OSError."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "packs"
        self.index_path = self.folder / "index"
        self.dropped_folder = self.folder / "dropped"
        self._snapshot = Snapshot()
        self._open: dict[str, _PackFile] = {}

    def path(self, pack: str) -> Path:
        """Where a pack is."""
        return self.folder / f"{pack}{SUFFIX}"

    @property
    def snapshot(self) -> Snapshot:
        """The index as this process knows it; loaded when nothing was yet."""
        if self._snapshot.stamp is None:
            self.refresh()
        return self._snapshot

    def refresh(self) -> bool:
        """Load the index again if it, or what is dropped from it, has changed; returns whether it had."""
        old = self._snapshot
        # What is dropped comes first: an entry leaves that list only after an index without it was published.
        dropped_stamp, index_stamp = _stamp(self.dropped_folder), _stamp(self.index_path)
        if (dropped_stamp, index_stamp) == old.stamp:
            return False
        dropped = frozenset(self._dropped())
        if old.stamp is not None and index_stamp == old.stamp[1]:
            new = replace(old, dropped=dropped, stamp=(_settled(dropped_stamp), index_stamp))
        else:
            index, rebuilt = self._load(dropped)
            new = Snapshot(index, dropped, (_settled(dropped_stamp), index_stamp), rebuilt)
        self._snapshot = new
        for pack in [pack for pack in list(self._open) if pack not in new.index.packs]:
            self._open.pop(pack, None)
        return new.index is not old.index or new.dropped != old.dropped

    def find(self, key: str) -> Place | None:
        """Where the record is, as far as this process knows."""
        snapshot = self.snapshot
        if not len(snapshot.index):
            return None
        place = snapshot.index.find(key)
        return None if place is None or (key, place.pack) in snapshot.dropped else place

    @contextmanager
    def opened(self, key: str) -> Iterator[OpenRecord]:
        """The record's pack for reading; raises FileNotFoundError without such a key in the index, or such a pack."""
        place = self.find(key)
        if place is None:
            raise FileNotFoundError(errno.ENOENT, "not in the pack index", key)
        pack = self._opened_pack(place.pack)
        # `pack` is held here: its descriptor is closed only when nobody reads from it any more.
        yield OpenRecord(pack.descriptor, place.offset, place.length, place.pack)

    def sizes(self, keys: Sequence[str]) -> dict[str, int]:
        """Length in bytes of those records that the index has, in packs that are there and long enough."""
        self.refresh()
        snapshot = self.snapshot
        index = snapshot.index
        if not len(index) or not keys:
            return {}
        rows = index.rows(keys)
        found = np.flatnonzero(rows >= 0)
        if not len(found):
            return {}
        hits = rows[found]
        ends = index.offset[hits] + index.length[hits]
        lengths = self._pack_lengths(list(index.packs), np.unique(index.number[hits]).tolist())
        whole = ends <= lengths[index.number[hits]]
        if not whole.all():
            found, hits = found[whole], hits[whole]
        present = keys if len(found) == len(keys) else [keys[position] for position in found.tolist()]
        sizes = dict(zip(present, index.length[hits].tolist(), strict=True))
        for key, pack in snapshot.dropped:
            place = index.find(key) if key in sizes else None
            if place is not None and place.pack == pack:
                del sizes[key]
        return sizes

    def keys(self) -> Iterator[str]:
        """Keys of all packed records, in no particular order."""
        self.refresh()
        snapshot = self.snapshot
        dropped = {key for key, _ in snapshot.dropped}
        for key in snapshot.index.keys():  # noqa: SIM118
            if key not in dropped or self.find(key) is not None:
                yield key

    def drop(self, key: str, pack: str) -> None:
        """Let the record in this pack count as not there, durably and for all processes."""
        self.dropped_folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.dropped_folder / f"{key}.{pack}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.close(descriptor)
        sync_folder(self.dropped_folder)
        self._snapshot = replace(self._snapshot, dropped=self._snapshot.dropped | {(key, pack)})

    def set_age(self, pack: str, modified: int) -> None:
        """A pack is as old as its youngest record: packing must not hide from gc how old records are."""
        os.utime(self.path(pack), ns=(modified, modified))

    def names(self) -> list[str]:
        """The packs in the folder, whether the index knows them or not."""
        try:
            return sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}") if _is_pack(path))
        except FileNotFoundError:
            return []

    def publish(self, index: PackIndex) -> None:
        """Make this the index, atomically and durably; only for who holds the store's maintenance."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.index_path, index.to_bytes())
        self.refresh()

    def rebuilt(self, dropped: Collection[tuple[str, str]]) -> tuple[PackIndex, dict[str, str]]:
        """The index as the packs' own headers tell it, and the packs that cannot be read with the reason."""
        packs: dict[str, int] = {}
        places: list[tuple[str, Place]] = []
        damaged: dict[str, str] = {}
        for name in self.names():
            try:
                found, length = read_places(self.path(name), name)
            except PackDamagedError as error:
                damaged[name] = str(error)
            except FileNotFoundError:
                continue
            else:
                packs[name] = length
                places += [(key, place) for key, place in found if (key, name) not in dropped]
        return PackIndex.of(packs, places), damaged

    def _load(self, dropped: frozenset[tuple[str, str]]) -> tuple[PackIndex, bool]:
        try:
            return PackIndex.from_bytes(self.index_path.read_bytes()), False
        except (FileNotFoundError, IndexDamagedError):
            index, _ = self.rebuilt(dropped)
            return index, bool(index.packs)

    def _dropped(self) -> Iterator[tuple[str, str]]:
        with suppress(FileNotFoundError):
            for name in os.listdir(self.dropped_folder):
                key, _, pack = name.partition(".")
                if is_key(key) and pack:
                    yield key, pack

    def _pack_lengths(
        self, names: Sequence[str], needed: Collection[int]
    ) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Length of each needed pack's file as it is now, 0 for one that is not there."""
        lengths = np.zeros(len(names), dtype=np.uint64)
        for number in needed:
            with suppress(FileNotFoundError):
                lengths[number] = os.stat(f"{self.folder}/{names[number]}{SUFFIX}").st_size
        return lengths

    def _opened_pack(self, name: str) -> _PackFile:
        pack = self._open.get(name)
        if pack is None:
            try:
                pack = _PackFile(self.path(name))
            except OSError as error:
                if error.errno in _GONE:
                    raise FileNotFoundError(error.errno, "the pack is gone", name) from error
                raise
        if len(self._open) >= OPEN_PACKS:  # only then does it matter which was used last
            self._open.pop(name, None)
            while len(self._open) >= OPEN_PACKS:
                self._open.pop(next(iter(list(self._open))), None)
        self._open[name] = pack
        return pack


class _PackFile:
    """An open pack; closed when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _is_pack(path: Path) -> bool:
    return is_key(path.name.removesuffix(SUFFIX))


def _settled(stamp: Stamp) -> Stamp:
    """The stamp of a folder, or one that fits nothing while another change might leave the same time of change."""
    return stamp if not stamp or time.time_ns() - stamp[2] > 1_000_000_000 else (-1,)


def _stamp(path: Path) -> Stamp:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
