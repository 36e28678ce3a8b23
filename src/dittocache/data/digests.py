"""Content digests of files, each file read once for as long as it does not change.

An index remembers, by path, the digest and what the file's status was when it was read: size, and the times of the last
change of content and of status (mtime, ctime). A file whose status is the same is not read again. Setting the mtime
back after a change does not deceive it: the system sets ctime itself.

Times have a granularity (up to two seconds on FAT, one on older network file systems), so that a file may change twice
within one tick. Like git's index, this one does not trust what it read within that time of the file's last change, and
reads such a file again the next time.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from dittocache.errors import DataError, StoreUnavailableError

DIGEST_BYTES = 16
INDEX_VERSION = 1
GRANULARITY_NS = 2_000_000_000
_CHUNK_BYTES = 4 * 1024 * 1024
_LARGE_BYTES = 64 * 1024 * 1024
_READERS = 4

Progress = Callable[[int, int], None]

Status = tuple[int, int, int]  # size in bytes, mtime and ctime in nanoseconds
_Entry = tuple[int, int, int, int, str]  # status, time at which reading began (ns), digest


class Digests(Protocol):
    """Gives the digest of a file's content."""

    def digest(self, file: Path) -> str:
        """blake3 of the content, 128 bits as 32 hex digits; raises DataError when the file cannot be read."""
        ...


class ContentIndex:
    """Digests of files by content, remembered in one JSON file.

    Args:
        path: the index; it need not exist. A damaged one is started afresh: only time is lost.
        progress: told of large reads, as (bytes read, bytes in all): weights take a while the first time.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self.path = path
        self._progress = progress
        self._known = _read_index(path)
        self._fresh: dict[str, _Entry] = {}

    def digest(self, file: Path) -> str:
        """blake3 of the content, 128 bits as 32 hex digits; raises DataError when the file cannot be read."""
        return self.status_and_digest(file)[1]

    def status_and_digest(self, file: Path) -> tuple[Status, str]:
        """The digest together with the status of the file that it belongs to."""
        name = os.path.abspath(file)
        status = status_of(file)
        entry = self._fresh.get(name) or self._known.get(name)
        if entry is not None and entry[:3] == status and _settled(status, entry[3]):
            return status, entry[4]
        began = time.time_ns()
        digest = hash_file(file)
        if status_of(file) != status:
            raise DataError(f"{file} changed while it was read; wait until it is complete, then start again")
        self._fresh[name] = (*status, began, digest)
        return status, digest

    def read_ahead(self, files: Sequence[Path]) -> None:
        """Read those of the files that are not known, several at once; `digest` tells of problems later."""
        unknown = [file for file in files if not self._is_known(file)]
        total, done = sum(_length(file) for file in unknown), 0

        def read(file: Path) -> int:
            with suppress(DataError):  # whoever asks for this file is told
                self.digest(file)
            return _length(file)

        if len(unknown) > 1 or total > _LARGE_BYTES:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="digests") as readers:
                for count in readers.map(read, unknown):
                    done += count
                    if self._progress is not None and total > _LARGE_BYTES:
                        self._progress(done, total)

    def _is_known(self, file: Path) -> bool:
        name = os.path.abspath(file)
        entry = self._fresh.get(name) or self._known.get(name)
        try:
            return entry is not None and entry[:3] == (status := status_of(file)) and _settled(status, entry[3])
        except DataError:
            return False

    def save(self) -> None:
        """Write what was learnt, together with what other processes wrote meanwhile; atomic.

        Raises StoreUnavailableError when the folder cannot be written.
        """
        if not self._fresh:
            return
        files = {**_read_index(self.path), **self._fresh}
        content = json.dumps({"version": INDEX_VERSION, "files": files}, separators=(",", ":"))
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(content, encoding="ascii")
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreUnavailableError(
                f"the content index {self.path} cannot be written ({error.strerror or error}); "
                "free space there or choose another cache_dir"
            ) from error
        self._known, self._fresh = files, {}


def text_digest(text: str) -> str:
    """blake3 of the text's UTF-8 bytes, 128 bits as 32 hex digits."""
    return str(blake3(text.encode("utf-8", "surrogatepass")).hexdigest(length=DIGEST_BYTES))


def status_of(file: Path) -> Status:
    """Size, mtime and ctime of the file; raises DataError when it is missing or no file."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _length(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return 0


def _settled(status: Status, read_at_ns: int) -> bool:
    """Whether the file had been left alone for longer than the clock's granularity when it was read."""
    return max(status[1], status[2]) + GRANULARITY_NS < read_at_ns


def hash_file(file: Path) -> str:
    """blake3 of the content, 128 bits as 32 hex digits; raises DataError when the file cannot be read."""
    # Threads cost more than they save on pictures; on a file of gigabytes they do not.
    hasher = blake3(max_threads=blake3.AUTO) if _length(file) > _LARGE_BYTES else blake3()
    try:
        with open(file, "rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                hasher.update(chunk)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    return str(hasher.hexdigest(length=DIGEST_BYTES))


def _read_index(path: Path) -> Mapping[str, _Entry]:
    """The entries of an index; none when it is missing, damaged or of another version."""
    try:
        content: Any = json.loads(path.read_bytes())
        if content["version"] != INDEX_VERSION:
            return {}
        return {str(name): _entry(fields) for name, fields in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # everything in it can be computed again


def _entry(fields: Any) -> _Entry:
    size, mtime, ctime, began, digest = fields
    if not (isinstance(digest, str) and len(digest) == 2 * DIGEST_BYTES):
        raise ValueError(f"{digest!r} is no digest")
    return int(size), int(mtime), int(ctime), int(began), digest
