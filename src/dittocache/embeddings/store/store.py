"""The store: immutable records on disk, written by any number of processes at once without locks.

README.md beside this file specifies the layout. A record appears under its name only once all of its bytes are durable;
a record that does not match its checksum is never returned but moved to `quarantine/`.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittocache.embeddings.recipe import Recipe
from dittocache.embeddings.store import writer_id
from dittocache.embeddings.store.durable import TEMPORARY_PATTERN, replace_file, sync_folder, writer_of
from dittocache.embeddings.store.record import LENGTH_BYTES, Header, header_length, pack, parse_header, unpack
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError, StoreUnavailableError

LAYOUT_VERSION = 1
SUFFIX = ".safetensors"
STALE_SECONDS = 3600.0
_HEADER_GUESS = 4096  # most headers fit: one read instead of two
_KEY_LENGTH = 32
_MEND = {
    errno.ENOSPC: "the disk is full: free space or choose another cache_dir",
    errno.EDQUOT: "your quota is used up: free space or choose another cache_dir",
    errno.EROFS: "the file system is read-only: choose another cache_dir",
    errno.EACCES: "permission is denied: change the folder's owner or mode, or choose another cache_dir",
    errno.EPERM: "permission is denied: change the folder's owner or mode, or choose another cache_dir",
    errno.ENAMETOOLONG: "the path is too long for this file system: choose a shorter cache_dir",
    errno.ENOTDIR: "a part of the path is a file: choose another cache_dir",
}


@dataclass(frozen=True)
class OpenRecord:
    """An open file that holds a record: `length` bytes from `offset`."""

    descriptor: int
    offset: int
    length: int


class Store:
    """Records by key below one folder.

    Args:
        root: the folder; it is created by the first write.

    Raises CacheError when a newer version of dittocache laid the folder out.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._check_layout()

    def write(self, key: str, tensor: torch.Tensor, recipe: Mapping[str, Any]) -> int:
        """Store a tensor under the key of its recipe and return the record's length in bytes.

        When it returns, the record is durable. A record that is there already, as far as its header tells, stays.
        Raises StoreUnavailableError when the folder cannot be written (disk full, read-only, no permission, path too
        long), leaving nothing behind; CacheError when the key is not the recipe's.
        """
        content = pack(key, tensor, recipe)
        present = self.sizes([key])
        if present:
            return present[key]
        path = self._path(key)
        with self._unavailable(f"record {key} cannot be written to {path.parent}"):
            self._make_folder(path.parent)
            replace_file(path, content)
        return len(content)

    def read(self, key: str) -> torch.Tensor:
        """The tensor, on the CPU, after its whole record was verified.

        Raises RecordMissingError; RecordCorruptError after moving the record to quarantine, so that it counts as
        missing from then on; StoreUnavailableError when the folder cannot be read.
        """
        with self._opened(key) as descriptor:
            content = bytearray(os.fstat(descriptor).st_size)
            filled = _read_into(descriptor, memoryview(content))
            try:
                return unpack(memoryview(content)[:filled], key)
            except RecordCorruptError as error:
                where = self._quarantine(key, descriptor)
                raise RecordCorruptError(f"record {key}: {error}; {where}. Caching again makes it anew") from error

    def __contains__(self, key: object) -> bool:
        """Whether the record is there and as long as its header promises; its bytes are verified when it is read."""
        return isinstance(key, str) and bool(self.sizes([key]))

    def sizes(self, keys: Iterable[str]) -> dict[str, int]:
        """Length in bytes of those records that are there and whole as far as their headers tell."""
        found = {}
        for key in keys:
            try:
                found[key] = self.header(key).end
            except (RecordMissingError, RecordCorruptError):
                continue  # both count as not there: the caller asks what is left to encode
        return found

    def bytes_of(self, key: str) -> int:
        """Length of the record in bytes; raises RecordMissingError or RecordCorruptError."""
        return self.header(key).end

    def recipe_of(self, key: str) -> Recipe:
        """What the record was made from; raises RecordMissingError or RecordCorruptError."""
        return self.header(key).recipe

    def header(self, key: str) -> Header:
        """The record's header, checked against the record's length; raises RecordMissingError or RecordCorruptError."""
        with self._opened(key) as descriptor:
            start = os.pread(descriptor, _HEADER_GUESS, 0)
            wanted = LENGTH_BYTES + header_length(start)
            if wanted > len(start):
                start = os.pread(descriptor, wanted, 0)
            return parse_header(start, os.fstat(descriptor).st_size)

    def keys(self) -> Iterator[str]:
        """Keys of all records, in no particular order; whether they are whole is not looked at."""
        with self._unavailable(f"the store {self.root} cannot be read"):
            for path in self._objects.glob(f"??/*{SUFFIX}"):
                if not path.name.startswith("."):
                    yield path.name.removesuffix(SUFFIX)

    def sweep(self) -> int:
        """Remove what dead writers left half-written and return how many files that were.

        A temporary file is removed when its process is gone from this machine, or when it is older than an hour.
        """
        removed = 0
        with self._unavailable(f"the store {self.root} cannot be swept"):
            for temporary in self._objects.glob(f"??/{TEMPORARY_PATTERN}"):
                try:
                    too_old = time.time() - temporary.stat().st_mtime > STALE_SECONDS
                except FileNotFoundError:
                    continue  # its writer finished meanwhile
                if too_old or writer_id.is_dead(writer_of(temporary)):
                    temporary.unlink(missing_ok=True)
                    removed += 1
        return removed

    @property
    def _objects(self) -> Path:
        return self.root / "objects"

    def _path(self, key: str) -> Path:
        if len(key) != _KEY_LENGTH or not set(key) <= set("0123456789abcdef"):
            raise CacheError(f"{key!r} is no key; expected {_KEY_LENGTH} hex digits (recipe_key)")
        return self._objects / key[:2] / f"{key}{SUFFIX}"

    @contextmanager
    def opened(self, key: str) -> Iterator[OpenRecord]:
        """Where the record's bytes are, for as long as the context lasts; nothing is verified.

        Raises RecordMissingError; StoreUnavailableError when the folder cannot be read.
        """
        with self._opened(key) as descriptor:
            yield OpenRecord(descriptor, 0, os.fstat(descriptor).st_size)

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """A descriptor of the record for reading."""
        path = self._path(key)
        with self._unavailable(f"record {key} cannot be read from {path.parent}"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise RecordMissingError(f"record {key} is not in {self.root}; cache the data set again") from error
            try:
                yield descriptor
            finally:
                os.close(descriptor)

    def _quarantine(self, key: str, descriptor: int) -> str:
        """Move the record that `descriptor` reads out of the way, and say where it is."""
        path = self._path(key)
        shelter = self.root / "quarantine"
        target = shelter / f"{key}.{time.time_ns()}{SUFFIX}"
        try:
            if not os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return "another process has replaced it meanwhile"
            shelter.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        except FileNotFoundError:
            return "another process has taken it out of the store meanwhile"
        except OSError as error:
            return f"it could not be moved to {shelter} ({error.strerror or error}): remove {path}"
        return f"it was moved to {target}"

    def _check_layout(self) -> None:
        layout = self.root / "layout.json"
        try:
            with self._unavailable(f"the store {self.root} cannot be read"):
                if not layout.exists():
                    return
                version = json.loads(layout.read_bytes())["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{layout} is damaged ({error!r}); remove it: it is written again") from error
        if version != LAYOUT_VERSION:
            raise CacheError(
                f"the store {self.root} has layout {version!r}, this version of dittocache knows {LAYOUT_VERSION}; "
                "upgrade dittocache or choose another cache_dir"
            )

    def _make_folder(self, folder: Path) -> None:
        """Create a folder of records durably; the first one also says which layout the store has."""
        if folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        layout = self.root / "layout.json"
        if not layout.exists():
            replace_file(layout, json.dumps({"version": LAYOUT_VERSION}).encode())

    @contextmanager
    def _unavailable(self, what: str) -> Iterator[None]:
        """Turn the operating system's errors into one that says how to mend them."""
        try:
            yield
        except CacheError:
            raise
        except OSError as error:
            mend = _MEND.get(error.errno or 0, "look after the disk or network mount, or choose another cache_dir")
            raise StoreUnavailableError(f"{what} ({error.strerror or error}): {mend}") from error


def _read_into(descriptor: int, buffer: memoryview) -> int:
    """Fill the buffer from the start of the file; returns how many bytes there were."""
    filled = 0
    while filled < len(buffer):
        count = os.preadv(descriptor, [buffer[filled:]], filled)
        if count == 0:
            break
        filled += count
    return filled
