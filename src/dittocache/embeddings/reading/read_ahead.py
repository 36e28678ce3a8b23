"""Batch after batch, read in threads of the training process while earlier ones are in use.

Threads, because copying from worker processes costs more than reading does; reading and checksums release the GIL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

BATCHES_AHEAD = 2  # at least, beside the one that is given out
SAMPLES_AHEAD = 2  # at least, for each thread
THREAD_NAME = "cached-samples"

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class Reading(Generic[BatchT]):
    """A batch whose memory is there, and the pieces of work, one for each sample, that fill it."""

    batch: BatchT
    parts: Sequence[Callable[[], None]]


def read_ahead(
    batches: Iterable[Sequence[str]], begin: Callable[[Sequence[str]], Reading[BatchT]], threads: int
) -> Iterator[BatchT]:
    """Filled batches, in order; `begin` and the parts run in threads.

    An error is raised where its batch would have been given out; closing the iterator early stops the reading.
    """
    waiting: deque[tuple[int, Future[_Started[BatchT]]]] = deque()
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=THREAD_NAME)
    try:
        for names in batches:
            waiting.append((len(names), pool.submit(_start, pool, begin, names)))
            ahead = sum(count for count, _ in waiting) - waiting[0][0]
            if len(waiting) > BATCHES_AHEAD and ahead >= SAMPLES_AHEAD * threads:
                yield _finish(waiting.popleft()[1])
        while waiting:
            yield _finish(waiting.popleft()[1])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Started(Generic[BatchT]):
    batch: BatchT
    parts: Sequence[Future[None]]


def _start(
    pool: ThreadPoolExecutor, begin: Callable[[Sequence[str]], Reading[BatchT]], names: Sequence[str]
) -> _Started[BatchT]:
    reading = begin(names)
    return _Started(reading.batch, [pool.submit(part) for part in reading.parts])


def _finish(started: Future[_Started[BatchT]]) -> BatchT:
    """The batch, once it is filled; nothing here refers to it afterwards, so that its memory can be used again."""
    found = started.result()
    for part in found.parts:
        part.result()
    return found.batch
