"""Encode what a plan misses: one encoder in memory at a time, every batch stored as soon as it is computed.

Whatever ends the process, what was stored stays and is not encoded again: at most the batch in flight is lost.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dittocache.data.sample import Sample
from dittocache.embeddings.encoding.stopping import HeldSignals
from dittocache.embeddings.planning.plan import Need, Plan
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, DataError, ModelError
from dittocache.events import EventLog, Progress
from dittocache.families.base import Family, Tensors
from dittocache.families.pictures import open_picture

# Waiting for the disk side by side is several times faster: file systems commit concurrent syncs together.
WRITERS = 8
_OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class EncodeResult:
    """What one call of `encode_missing` did.

    Attributes:
        encoded: records that were computed and stored.
        reused: records that were there already.
        bytes_written: length of the new records.
        seconds: wall time, the loading of encoders included.
        failed: picture file -> why its sample could not be encoded.
        failed_samples: the names of those samples, for `Manifest.without`.
    """

    encoded: int = 0
    reused: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    failed_samples: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def encode_missing(
    plan: Plan,
    encoders: Sequence[str | None],
    family: Family,
    model: str | Path,
    dtype: torch.dtype,
    device: str | torch.device,
    batch_size: int,
    store: Store,
    log: EventLog,
) -> EncodeResult:
    """Compute and store the records of `encoders` that the plan misses.

    Args:
        plan: of the same family, model and dtype.
        encoders: components in the order in which they are loaded; None for the artifacts that need none.
        batch_size: samples an encoder takes at once; halved whenever memory runs out.
        log: receives messages, and progress with samples a second and ETA for each encoder.

    A sample with a picture that cannot be read, or that changed since the plan, is left out, named in the result and
    reported at the end. SIGINT and SIGTERM take effect once the batch in flight is stored. Raises
    StoreUnavailableError when a record cannot be written, CacheError when a single sample does not fit into memory,
    ModelError for an encoder that the family does not have.
    """
    if (str(model), dtype) != (plan.model, plan.dtype):
        raise CacheError(f"the plan was made for {plan.model} in {plan.dtype}; found {model} in {dtype}: plan again")
    unknown = [encoder for encoder in encoders if encoder is not None and encoder not in family.encoders]
    if unknown:
        raise ModelError(f"{family.name} has no encoder {unknown[0]!r}; it has {', '.join(family.encoders)}")
    started = time.monotonic()
    result = EncodeResult(reused=_reused(plan, encoders))
    if any(plan.missing(encoder) for encoder in encoders):
        store.sweep()
    with HeldSignals() as signals, ThreadPoolExecutor(WRITERS) as writers:
        for encoder in encoders:
            if plan.missing(encoder):
                run = _EncoderRun(plan, encoder, family, device, batch_size, store, log, writers, signals, result)
                run.encode_all()
                del run  # and with it the encoder, before the next one is loaded
                if encoder is not None:
                    _free_memory()
    for path, problem in result.failed.items():
        log.message(f"left out: {path}: {problem}", level="error")
    result.seconds = time.monotonic() - started
    return result


class _EncoderRun:
    """One encoder, from loading it to the last record."""

    def __init__(
        self,
        plan: Plan,
        encoder: str | None,
        family: Family,
        device: str | torch.device,
        batch_size: int,
        store: Store,
        log: EventLog,
        writers: Executor,
        signals: HeldSignals,
        result: EncodeResult,
    ) -> None:
        self._plan = plan
        self._encoder = encoder
        self._family = family
        self._batch_size = batch_size
        self._store = store
        self._log = log
        self._writers = writers
        self._signals = signals
        self._result = result
        self._needs: dict[str, Need] = {need.sample.name: need for need in plan.needs[encoder]}
        self._done: set[str] = set()
        self._pipe: Any = None
        if encoder is not None:
            log.message(f"loading {encoder} of {plan.model} for {len(plan.missing(encoder))} of the samples")
            components = [encoder, *family.encoders[encoder]]
            self._pipe = family.load_pipeline(plan.model, components, plan.dtype, device)

    def encode_all(self) -> None:
        """Encode until every record exists, except those of samples that failed."""
        total = len(self._missing())
        progress = Progress(self._log, total)
        while samples := self._missing():  # again where a sample failed that others share a record with
            progress.total = max(total, progress.done + len(samples))
            position = 0
            while position < len(samples):
                self._signals.deliver()
                batch = samples[position : position + self._batch_size]
                if not self._store_batch(batch):
                    continue
                position += len(batch)
                progress.advance(len(batch))
        self._signals.deliver()

    def _missing(self) -> list[Sample]:
        return self._plan.missing(self._encoder, self._done, self._result.failed_samples)

    def _store_batch(self, batch: Sequence[Sample]) -> bool:
        """Encode and store a batch; False when it did not fit into memory and a smaller one has to be tried."""
        batch = [sample for sample in batch if not self._stored_by_another(sample)]
        if not batch:
            return True
        try:
            encoded = self._encode(batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise CacheError(
                    f"memory ran out while {self._encoder} encoded sample {batch[0].name!r} alone ({error}); "
                    "lower data.resolution, or choose another device in cache.devices"
                ) from error
            self._batch_size = len(batch) // 2
        else:
            self._store_samples(encoded)
            return True
        _free_memory()  # after the exception is gone, which held on to the encoder's activations
        self._log.message(f"memory ran out; going on with batches of {self._batch_size}", level="warning")
        return False

    def _encode(self, batch: Sequence[Sample]) -> list[tuple[Sample, Tensors]]:
        """The tensors of those samples of the batch that can be encoded."""
        try:
            tensors = self._family.encode(self._pipe, self._encoder, batch, self._plan.sizes)
        except DataError as error:
            if len(batch) > 1:
                return [pair for sample in batch for pair in self._encode([sample])]
            self._fail(batch[0], *_blame(batch[0], error))
            return []
        return list(zip(batch, tensors, strict=True))

    def _store_samples(self, encoded: Sequence[tuple[Sample, Tensors]]) -> None:
        """Store what is missing of these samples; all of it is on the disk when this returns."""
        tensors_by_key: dict[str, torch.Tensor] = {}
        for sample, tensors in encoded:
            changed = [file for file in _pictures(sample) if self._plan.snapshot.changed_since(file)]
            if changed:
                self._fail(sample, changed[0], "it changed while it was being cached; start again")
                continue
            for artifact, key in self._needs[sample.name].keys.items():
                if artifact not in tensors:
                    raise ModelError(
                        f"{self._family.name} lists {artifact} as made by {self._encoder} but encode() gave only "
                        f"{', '.join(tensors)}; mend the family"
                    )
                if key not in self._done and key not in self._plan.stored:
                    tensors_by_key[key] = tensors[artifact]
        recipes = self._plan.manifest.recipes
        writes = {
            key: self._writers.submit(self._store.write, key, tensor, recipes[key])
            for key, tensor in tensors_by_key.items()
        }
        for key, write in writes.items():
            self._result.bytes_written += write.result()
            self._result.encoded += 1
            self._done.add(key)

    def _stored_by_another(self, sample: Sample) -> bool:
        """Whether another process has stored all that is missing of this sample since the plan was made."""
        keys = {key for key in self._needs[sample.name].keys.values() if key not in self._plan.stored}
        found = self._store.sizes(keys - self._done)
        if keys - self._done - found.keys():
            return False
        self._result.reused += len(found)
        self._done.update(found)
        return True

    def _fail(self, sample: Sample, picture: Path, problem: str) -> None:
        self._result.failed[str(picture)] = problem
        self._result.failed_samples.append(sample.name)


def _reused(plan: Plan, encoders: Sequence[str | None]) -> int:
    keys = {key for encoder in encoders for need in plan.needs.get(encoder, ()) for key in need.keys.values()}
    return len(keys & plan.stored.keys())


def _pictures(sample: Sample) -> list[Path]:
    return [sample.target, *sample.controls, *([sample.mask] if sample.mask else [])]


def _blame(sample: Sample, error: DataError) -> tuple[Path, str]:
    """The picture that cannot be read, else the target; and what is wrong with it."""
    for picture in _pictures(sample):
        try:
            open_picture(picture)
        except DataError as found:
            return picture, str(found)
    return sample.target, str(error)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error).lower() for words in _OUT_OF_MEMORY_WORDS
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
