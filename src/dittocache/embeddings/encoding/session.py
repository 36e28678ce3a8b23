"""One encoder in memory, asked for records as often as there is work: batches, memory, pictures, writing.

Whatever ends the process, what was stored stays and is not encoded again: at most the batches in flight are lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dittocache.data.sample import Sample
from dittocache.embeddings.encoding.decode import PictureFeed
from dittocache.embeddings.encoding.memory import can_tile, free_memory, is_out_of_memory, tiling
from dittocache.embeddings.encoding.result import EncodeResult
from dittocache.embeddings.encoding.stopping import HeldSignals
from dittocache.embeddings.encoding.storage_costs import StorageCosts
from dittocache.embeddings.encoding.tasks import Task, bucket_of, in_order, make_tasks, next_batch
from dittocache.embeddings.encoding.writing import RecordWriter, WrittenBatch
from dittocache.embeddings.planning.plan import Need, Plan
from dittocache.embeddings.store.store import NewRecord, Store
from dittocache.errors import CacheError, DataError, ModelError, StoreUnavailableError
from dittocache.events import EventLog, Progress
from dittocache.families.base import Family, Tensors
from dittocache.families.pictures import PictureRequest, open_picture

TILED = {"vae_tiling": True}


@dataclass(frozen=True)
class EncodeSettings:
    """How an encoder works.

    Attributes:
        batch_size: samples it takes at once, in the way that the plan says; halved whenever memory runs out.
        num_workers: processes that decode pictures ahead; 0 decodes in line.
        skip_existing: False encodes everything once more and replaces what is stored.
    """

    batch_size: int = 4
    num_workers: int = 0
    skip_existing: bool = True


class EncoderSession:
    """Encodes what it is given with one encoder, which is loaded when it is first needed; a context manager.

    Args:
        plan: of the same family.
        encoder: a component's name; None for the artifacts that need none.
        progress: counts the samples of all calls; without it every call of `encode` reports its own.
        signals: held back until what is in flight is stored; without it the session holds SIGINT and SIGTERM itself.

    Raises ModelError for an encoder that the family does not have.
    """

    def __init__(
        self,
        plan: Plan,
        encoder: str | None,
        family: Family,
        device: str | torch.device,
        store: Store,
        log: EventLog,
        settings: EncodeSettings = EncodeSettings(),
        *,
        progress: Progress | None = None,
        signals: HeldSignals | None = None,
    ) -> None:
        if encoder is not None and encoder not in family.encoders:
            raise ModelError(f"{family.name} has no encoder {encoder!r}; it has {', '.join(family.encoders)}")
        self._plan = plan
        self._encoder = encoder
        self._family = family
        self._device = device
        self._store = store
        self._log = log
        self._settings = settings
        self._shared_progress = progress
        self._progress = progress or Progress(log, 0)
        self._signals = signals or HeldSignals()
        self._holds_signals = signals is None
        self._batch_size = settings.batch_size
        self._covered: set[str] = set()  # keys stored, or on their way, since the plan was made
        self._failed: set[str] = set()
        self._tiled: set[Any] = set()  # buckets whose pictures do not fit into memory whole
        self._costs = StorageCosts()
        self._samples = 0
        self._seconds = 0.0  # of encoding, the loading of the encoder left out
        self._pipe: Any = None
        self._open = ExitStack()

    def __enter__(self) -> EncoderSession:
        if self._holds_signals:
            self._open.enter_context(self._signals)
        self._feed = self._open.enter_context(PictureFeed(self._settings.num_workers))
        writer = RecordWriter(self._store, replace=not self._settings.skip_existing, costs=self._costs)
        self._writer = self._open.enter_context(writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        loaded = self._pipe is not None
        self._pipe = None
        if loaded:
            free_memory()
        self._open.__exit__(kind, error, traceback)
        for line in self._costs.lines():
            self._log.message(line)
        self._remember_rate()

    def encode(self, needs: Iterable[Need]) -> EncodeResult:
        """Compute and store those of the needed records that are missing; all of them are durable when it returns.

        A sample with a picture that cannot be read, or that changed since the plan, is left out and named in the
        result. Raises StoreUnavailableError when a record cannot be written, CacheError when a single sample does not
        fit into memory.
        """
        started = time.monotonic()
        result = EncodeResult()
        needs = in_order(needs, self._encoder)
        tasks = make_tasks(needs, self._is_covered, self._failed)
        self._progress = self._shared_progress or Progress(self._log, len(tasks))
        self._feed.expect(sum(len(self._pictures(task)) for task in tasks))
        while tasks:
            self._encode_all(tasks, result)
            tasks = make_tasks(needs, self._is_covered, self._failed)  # those that shared a record with a failed one
            self._progress.total += len(tasks) if self._shared_progress is None else 0
        self._drain(result)
        if result.tiled:
            self._log.message(f"encoded in tiles, for want of memory: {', '.join(result.tiled)}", level="warning")
        self._signals.deliver()
        result.seconds = time.monotonic() - started
        self._samples += result.samples
        self._seconds += result.seconds
        return result

    def _remember_rate(self) -> None:
        """So that the next plan can tell how long encoding will take."""
        forecast = self._plan.forecast
        if self._encoder is None or forecast.rates is None or not self._samples:
            return
        name = forecast.classes[self._encoder], str(self._plan.dtype).removeprefix("torch."), str(self._device)
        try:
            forecast.rates.record(*name, self._plan.sizes.resolution, samples=self._samples, seconds=self._seconds)
        except StoreUnavailableError as error:
            self._log.message(f"the next plan will not know how long encoding took: {error}", level="warning")

    def _is_covered(self, key: str) -> bool:
        return key in self._covered or (self._settings.skip_existing and key in self._plan.stored)

    def _encode_all(self, tasks: Sequence[Task], result: EncodeResult) -> None:
        position = announced = 0
        while position < len(tasks):
            self._deliver(result)
            batch = next_batch(tasks, position, self._batch_size, self._bucket, self._needs_tiles)
            ahead = min(len(tasks), position + 2 * max(self._batch_size, self._settings.num_workers))
            self._feed.announce(one for task in tasks[announced:ahead] for one in self._pictures(task))
            announced = max(announced, ahead)
            if self._store_batch(batch, result):
                position += len(batch)
                self._feed.release(one for task in batch for one in self._pictures(task))

    def _store_batch(self, batch: Sequence[Task], result: EncodeResult) -> bool:
        """Encode a batch and begin to store it; False when it did not fit into memory and has to be tried again."""
        open_tasks = self._not_stored_by_others(batch, result)
        tiled = any(map(self._needs_tiles, batch))
        try:
            encoded = self._encode(open_tasks, tiled, result)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            mend = self._smaller_than(batch, tiled, error)
        else:
            records = self._records(encoded, tiled, result)
            self._count(self._writer.submit(records, len(batch)), result)
            return True
        self._drain(result)  # tensors on their way are memory too
        free_memory(self._pipe)  # after the exception is gone, which held on to the encoder's activations
        self._log.message(f"memory ran out; {mend}", level="warning")
        return False

    def _smaller_than(self, batch: Sequence[Task], tiled: bool, error: BaseException) -> str:
        """Ask for less the next time, and say what; raises CacheError where there is nothing smaller."""
        if len(batch) > 1:
            self._batch_size = len(batch) // 2
            return f"going on with batches of {self._batch_size}"
        name = batch[0].sample.name
        if self._encoder == "vae" and not tiled and can_tile(self._pipe):
            self._tiled.add(bucket_of(self._encoder, batch[0].sample))
            return f"the VAE takes {name!r} and other pictures of its size in tiles"
        mends = "another device in cache.devices, or `cpu` there"
        if self._encoder == "vae":
            mends += ", or a lower data.resolution"
        elif batch[0].sample.controls:
            mends += ", or a lower data.condition_resolution (Qwen-Image-Edit: data.resolution)"
        raise CacheError(
            f"memory ran out while {self._encoder} encoded sample {name!r} alone ({error}); choose {mends}"
        ) from error

    def _encode(self, tasks: Sequence[Task], tiled: bool, result: EncodeResult) -> list[tuple[Task, Tensors]]:
        """The tensors of those tasks that can be carried out."""
        if not tasks:
            return []
        if self._pipe is None and self._encoder is not None:
            self._load()
        try:
            with tiling(self._pipe, tiled):
                tensors = self._family.encode(
                    self._pipe,
                    self._encoder,
                    [task.sample for task in tasks],
                    self._plan.sizes,
                    wanted=[task.keys.keys() for task in tasks],
                    pictures=self._feed,
                    together=self._plan.batching == "together",
                )
        except DataError as error:
            if len(tasks) > 1:
                return [pair for task in tasks for pair in self._encode([task], tiled, result)]
            self._fail(tasks[0].sample, *_blame(tasks[0].sample, error), result)
            return []
        return list(zip(tasks, tensors, strict=True))

    def _load(self) -> None:
        encoder = str(self._encoder)
        self._log.message(f"loading {encoder} of {self._plan.model}")
        started = time.monotonic()
        components = [encoder, *self._family.encoders[encoder]]
        self._pipe = self._family.load_pipeline(self._plan.model, components, self._plan.dtype, self._device)
        self._seconds -= time.monotonic() - started

    def _records(self, encoded: Sequence[tuple[Task, Tensors]], tiled: bool, result: EncodeResult) -> list[NewRecord]:
        """What there is to store of the samples whose pictures are still those of the plan."""
        records = []
        for task, tensors in encoded:
            changed = [file for file in _files(task.sample) if self._plan.snapshot.changed_since(file)]
            if changed:
                self._fail(task.sample, changed[0], "it changed while it was being cached; start again", result)
                continue
            for artifact, key in task.keys.items():
                if artifact not in tensors:
                    raise ModelError(
                        f"{self._family.name} lists {artifact} as made by {self._encoder} but encode() gave only "
                        f"{', '.join(tensors)}; mend the family"
                    )
                recipe = self._plan.recipe(key)
                records.append(NewRecord(key, tensors[artifact], recipe, TILED if tiled else None))
                self._covered.add(key)
            if tiled:
                result.tiled.append(task.sample.name)
            result.samples += 1
        return records

    def _not_stored_by_others(self, batch: Sequence[Task], result: EncodeResult) -> list[Task]:
        """What other processes have not stored of this batch since the plan was made."""
        if not self._settings.skip_existing:
            return list(batch)
        found = self._store.sizes({key for task in batch for key in task.keys.values()} - self._covered)
        result.reused += len(found)
        self._covered.update(found)
        left = [Task(task.sample, {name: key for name, key in task.keys.items() if key not in found}) for task in batch]
        return [task for task in left if task.keys]

    def _pictures(self, task: Task) -> Sequence[PictureRequest]:
        return self._family.pictures(self._encoder, task.sample, self._plan.sizes, task.keys.keys())

    def _bucket(self, task: Task) -> Any:
        """What a batch must have in common; nothing where samples pass one by one."""
        if self._plan.batching == "exact" and not self._tiled:
            return None
        return bucket_of(self._encoder, task.sample)

    def _needs_tiles(self, task: Task) -> bool:
        return bool(self._tiled) and bucket_of(self._encoder, task.sample) in self._tiled

    def _fail(self, sample: Sample, picture: Path, problem: str, result: EncodeResult) -> None:
        result.failed[str(picture)] = problem
        result.failed_samples.append(sample.name)
        self._failed.add(sample.name)

    def _deliver(self, result: EncodeResult) -> None:
        """Let a signal that came meanwhile take effect, with nothing in flight."""
        if self._signals.pending is not None:
            self._drain(result)
            self._signals.deliver()

    def _drain(self, result: EncodeResult) -> None:
        self._count(self._writer.drain(), result)

    def _count(self, written: Sequence[WrittenBatch], result: EncodeResult) -> None:
        for batch in written:
            result.encoded += batch.records
            result.bytes_written += batch.bytes
            self._progress.advance(batch.samples, batch.bytes)


def _files(sample: Sample) -> list[Path]:
    return [sample.target, *sample.controls, *([sample.mask] if sample.mask else [])]


def _blame(sample: Sample, error: DataError) -> tuple[Path, str]:
    """The picture that cannot be read, else the target; and what is wrong with it."""
    for picture in _files(sample):
        if str(picture) in str(error):
            return picture, str(error)
    for picture in _files(sample):
        try:
            open_picture(picture)
        except DataError as found:
            return picture, str(found)
    return sample.target, str(error)
