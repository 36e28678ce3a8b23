"""Read every record of a store and prove it; what does not prove itself goes to quarantine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from dittocache.embeddings.store.packing import proven
from dittocache.embeddings.store.record import parse_header
from dittocache.embeddings.store.storage import base_key_of
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError
from dittocache.events import EventLog, Progress

_AHEAD = 4  # records for each thread


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: its key, its artifact as far as its header tells, and why."""

    key: str
    artifact: str
    reason: str


@dataclass
class VerifyResult:
    """What verification found.

    Attributes:
        records, bytes_read: that were proven, bad ones included.
        bad: records that did not prove themselves, in quarantine now, and those whose base record is not there.
        damaged_packs: name -> why its own header cannot be read; its records are found as long as the index is whole.
    """

    records: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    bad: list[BadRecord] = field(default_factory=list)
    damaged_packs: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """The result in a few lines for a terminal."""
        speed = self.bytes_read / 1e6 / max(self.seconds, 1e-9)
        lines = [f"{self.records} records ({self.bytes_read / 1e6:.1f} MB) read at {speed:.0f} MB/s"]
        lines.append(f"{len(self.bad)} are bad; caching again makes them anew" if self.bad else "all are as written")
        lines += [f"  {one.key} {one.artifact}: {one.reason}" for one in self.bad]
        lines += [f"  pack {name}: {reason}" for name, reason in self.damaged_packs.items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def verify_store(store: Store, *, threads: int = 4, log: EventLog | None = None) -> VerifyResult:
    """Verify every record against its key, recipe and checksum.

    Args:
        threads: read and check side by side; both release the interpreter's lock.
        log: receives progress in records.

    May go on beside everything else. Raises StoreUnavailableError when the folder cannot be read.
    """
    started = time.monotonic()
    result = VerifyResult()
    if store.is_local:
        _, result.damaged_packs = store.local.packed.rebuilt(())
    keys = list(store.keys())
    progress = None if log is None else Progress(log, len(keys))
    for length, bad in _checked(store, keys, threads):
        result.records += length is not None
        result.bytes_read += length or 0
        if bad is not None:
            result.bad.append(bad)
        if progress is not None:
            progress.advance()
    result.seconds = time.monotonic() - started
    return result


def _checked(store: Store, keys: Iterable[str], threads: int) -> Iterator[tuple[int | None, BadRecord | None]]:
    waiting: deque[Future[tuple[int | None, BadRecord | None]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        try:
            for key in keys:
                waiting.append(pool.submit(_check, store, key))
                if len(waiting) > threads * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _check(store: Store, key: str) -> tuple[int | None, BadRecord | None]:
    """Length of the record and what is wrong with it; no length when it was removed meanwhile."""
    try:
        content = memoryview(store.fetch(key))
    except RecordMissingError:
        return None, None
    try:
        header = proven(content, key).header
        base = base_key_of(header.recipe) if header.needs_base else None
        if base is not None and base not in store:
            return len(content), BadRecord(key, header.name, f"the record {base} that it shares rows with is missing")
    except RecordCorruptError:
        try:
            store.read(key)  # proves it once more and moves it to quarantine
        except CacheError as error:
            return len(content), BadRecord(key, _artifact(content), str(error))
    return len(content), None


def _artifact(content: memoryview) -> str:
    try:
        return parse_header(content, len(content)).name
    except RecordCorruptError:
        return "unreadable"
