"""Loose records: one file each in `objects/`, written by any number of processes at once without locks."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dittocache.embeddings.store import writer_id
from dittocache.embeddings.store.durable import TEMPORARY_PATTERN, replace_files, sync_folder, writer_of
from dittocache.embeddings.store.record import LENGTH_BYTES, header_length, parse_header
from dittocache.errors import CacheError, RecordCorruptError

SUFFIX = ".safetensors"
STALE_SECONDS = 3600.0
LISTING_FROM = 2000  # keys: above, listing folders is faster than opening files
HEADER_GUESS = 4096  # bytes; most headers fit: one read instead of two
_KEY_LENGTH = 32
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class OpenRecord:
    """An open file that holds a record: `length` bytes from `offset`; `pack` is None for a loose record."""

    descriptor: int
    offset: int
    length: int
    pack: str | None = None


@dataclass(frozen=True)
class LooseFile:
    """A record's file as a listing shows it: bytes, and the time of its last change in nanoseconds."""

    key: str
    length: int
    modified: int


def is_key(text: str) -> bool:
    """Whether this is 32 lower-case hex digits."""
    return len(text) == _KEY_LENGTH and _HEX.issuperset(text)


class LooseRecords:
    """The records in `ROOT/objects`; every method may raise OSError."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "objects"

    def path(self, key: str) -> Path:
        """Where the record of a key is; raises CacheError for what is no key."""
        if not is_key(key):
            raise CacheError(f"{key!r} is no key; expected {_KEY_LENGTH} hex digits (recipe_key)")
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    @contextmanager
    def opened(self, key: str) -> Iterator[OpenRecord]:
        """The record's file for reading; raises FileNotFoundError."""
        descriptor = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield OpenRecord(descriptor, 0, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Make the records' files hold these bytes, each atomically, all durably."""
        files = {self.path(key): content for key, content in contents.items()}
        for folder in {path.parent for path in files}:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
        replace_files(files)

    def sizes(self, keys: Collection[str]) -> dict[str, int]:
        """Length in bytes of those records that are there.

        Of few keys each header is read, and a record shorter or longer than its header promises counts as not there.
        Of many only the folders are listed, which does not show that; reading such a record does.
        """
        if len(keys) >= LISTING_FROM:
            return self._listed(keys)
        found = {}
        for key in keys:
            with suppress(FileNotFoundError, RecordCorruptError), self.opened(key) as record:
                found[key] = parse_header(read_header(record), record.length).end
        return found

    def _listed(self, keys: Iterable[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        wanted: dict[str, set[str]] = {}  # one small set a folder is faster than a large one for all
        for key in keys:
            wanted.setdefault(key[:2], set()).add(key + SUFFIX)
        for folder in self._folders():
            names = wanted.get(folder.name)
            if names is None:
                continue
            with os.scandir(folder) as entries:
                for entry in entries:  # hundreds of thousands: nothing here that is not needed
                    name = entry.name
                    if name in names:
                        try:  # noqa: SIM105
                            found[name[:_KEY_LENGTH]] = entry.stat().st_size
                        except FileNotFoundError:
                            pass  # taken out meanwhile
        return found

    def files(self) -> Iterator[LooseFile]:
        """Every record's file, folder by folder."""
        for folder in self._folders():
            with os.scandir(folder) as entries:
                for entry in entries:
                    key = entry.name[:_KEY_LENGTH]
                    if entry.name == key + SUFFIX and is_key(key):
                        with suppress(FileNotFoundError):  # taken out meanwhile
                            status = entry.stat()
                            yield LooseFile(key, status.st_size, status.st_mtime_ns)

    def keys(self) -> Iterator[str]:
        """Keys of all records, in no particular order; whether they are whole is not looked at."""
        for folder in self._folders():
            with os.scandir(folder) as entries:
                for entry in entries:
                    key = entry.name[:_KEY_LENGTH]
                    if entry.name == key + SUFFIX and is_key(key):
                        yield key

    def temporaries(self) -> Iterator[Path]:
        """Half-written files whose writers are gone: from this machine, or silent for an hour."""
        for folder in self._folders():
            yield from abandoned(folder)

    def _folders(self) -> list[Path]:
        try:
            with os.scandir(self.folder) as entries:
                return sorted(Path(entry.path) for entry in entries if len(entry.name) == 2 and entry.is_dir())
        except FileNotFoundError:
            return []


def abandoned(folder: Path) -> Iterator[Path]:
    """The temporary files in a folder whose process is gone from this machine, or that are older than an hour."""
    for temporary in folder.glob(TEMPORARY_PATTERN):
        try:
            too_old = time.time() - temporary.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:
            continue  # its writer finished meanwhile
        if too_old or writer_id.is_dead(writer_of(temporary)):
            yield temporary


def read_header(record: OpenRecord) -> bytes:
    """The record's beginning, its header included; raises RecordCorruptError when there can be none."""
    start = os.pread(record.descriptor, min(HEADER_GUESS, record.length), record.offset)
    wanted = LENGTH_BYTES + header_length(start)
    if wanted > len(start):
        start = os.pread(record.descriptor, min(wanted, record.length), record.offset)
    return start


def read_bytes(record: OpenRecord) -> memoryview:
    """All bytes of the record, writable; fewer than its length where the file ends before."""
    content = memoryview(bytearray(record.length))
    filled = 0
    while filled < record.length:
        count = os.preadv(record.descriptor, [content[filled:]], record.offset + filled)
        if count == 0:
            break
        filled += count
    return content[:filled]
