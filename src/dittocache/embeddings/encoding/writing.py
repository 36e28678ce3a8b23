"""Store records while the encoder goes on with the next batch; a bounded number of batches is on its way."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch

from dittocache.embeddings.encoding.storage_costs import StorageCosts
from dittocache.embeddings.store.storage import base_key_of
from dittocache.embeddings.store.store import NewRecord, Store

# Waiting for the disk side by side is several times faster: file systems commit concurrent syncs together.
WRITERS = 8
BATCHES_IN_FLIGHT = 2
GROUP_BYTES = 4_000_000  # below it, a record's bytes cost less than its commit


@dataclass(frozen=True)
class WrittenBatch:
    """What is on the disk now: samples that were encoded together, their records and the records' bytes."""

    samples: int
    records: int
    bytes: int


class RecordWriter:
    """Copies tensors from the device and stores them in threads; a context manager.

    Args:
        replace: write records anew that are there already.
        costs: learns what the stored forms cost.
        batches: `submit` waits while this many batches are on their way, which bounds memory and what a kill loses.

    The first write that fails ends the work: `submit` and `drain` raise its error once no write is under way.
    """

    def __init__(
        self,
        store: Store,
        replace: bool = False,
        costs: StorageCosts | None = None,
        batches: int = BATCHES_IN_FLIGHT,
    ) -> None:
        self._store = store
        self._costs = costs
        self._replace = replace
        self._most = batches
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="record-writer")
        self._batches: deque[tuple[int, list[Future[list[int]]]]] = deque()
        self._streams = threading.local()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True)

    def submit(self, records: Sequence[NewRecord], samples: int) -> list[WrittenBatch]:
        """Begin to store the records of a batch; returns the batches that were finished meanwhile."""
        finished = self._finished(self._most - 1)
        ready = _event_of(records)
        begun: list[Future[list[int]]] = []
        # Bases first: the threads take writes in order, so that a write waits only for those that have begun.
        for depends in (False, True):
            part = [record for record in records if (base_key_of(record.recipe) is not None) == depends]
            bases = list(begun) if depends else []
            begun += [self._threads.submit(self._write, group, ready, bases) for group in self._groups(part)]
        self._batches.append((samples, begun))
        return finished

    def drain(self) -> list[WrittenBatch]:
        """Wait until all that was submitted is durable."""
        return self._finished(0)

    def _finished(self, left: int) -> list[WrittenBatch]:
        """Wait until at most `left` batches are on their way; the finished ones, in order."""
        finished = []
        while self._batches and (len(self._batches) > left or all(write.done() for write in self._batches[0][1])):
            samples, writes = self._batches.popleft()
            try:
                lengths = [length for write in writes for length in write.result()]
            except BaseException:
                self._give_up(writes)
                raise
            finished.append(WrittenBatch(samples, len(lengths), sum(lengths)))
        return finished

    def _give_up(self, writes: Sequence[Future[list[int]]]) -> None:
        """Let every write end that has begun: what it stored stays."""
        wait([*writes, *(write for _, batch in self._batches for write in batch)])
        self._batches.clear()

    def _groups(self, records: Sequence[NewRecord]) -> Iterator[list[NewRecord]]:
        """What one thread writes at once: small records together, large ones side by side."""
        group: list[NewRecord] = []
        for record in records:
            group.append(record)
            if not self._store.is_local or sum(one.tensor.nbytes for one in group) >= GROUP_BYTES:
                yield group
                group = []
        if group:
            yield group

    def _write(
        self, records: Sequence[NewRecord], ready: torch.cuda.Event | None, bases: Sequence[Future[list[int]]]
    ) -> list[int]:
        here = [replace(record, tensor=self._on_host(record.tensor, ready)) for record in records]
        if self._costs is not None:
            for record in here:
                self._costs.measure(record.tensor, record.recipe)
        for base in bases:
            base.result()
        return self._store.write_many(here, replace=self._replace)

    def _on_host(self, tensor: torch.Tensor, ready: torch.cuda.Event | None) -> torch.Tensor:
        """The tensor on the CPU, copied beside the encoder's work and not behind it."""
        if ready is None or not tensor.is_cuda:
            return tensor.to("cpu")
        if not hasattr(self._streams, "copies"):
            self._streams.copies = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams.copies):
            ready.wait()
            return tensor.to("cpu")  # returns once the copy is done


def _event_of(records: Sequence[NewRecord]) -> torch.cuda.Event | None:
    """Passes on the device once the tensors are computed; None on devices that copy in order."""
    device = next((record.tensor.device for record in records if record.tensor.is_cuda), None)
    if device is None:
        return None
    with torch.cuda.device(device):
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
    return event
