"""Cached samples for training: verified reads, ahead of time, straight into memory that is used again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.reading.buffers import Buffers, carve
from dittocache.embeddings.reading.collate import Column, columns, fill_masks, own_rows
from dittocache.embeddings.reading.read_ahead import Reading, read_ahead
from dittocache.embeddings.reading.records import Form, RecordReader
from dittocache.embeddings.store.store import Store
from dittocache.errors import DataError, RecordCorruptError, RecordMissingError
from dittocache.families.base import Tensors

Forms = Mapping[str, Form]


class CachedSamples:
    """Reads samples of a manifest from a store; sources of the samples are never looked at.

    Args:
        pin: whether batches are read into page-locked memory; by default where CUDA is available.

    It can be pickled and used on both sides of a fork.
    """

    def __init__(self, store: Store, manifest: Manifest, *, pin: bool | None = None) -> None:
        self._store = store
        self._manifest = manifest
        self._pin = pin
        self._records = RecordReader(store)
        self._buffers = Buffers(pin)

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), pin=self._pin), (self._store, self._manifest)

    @property
    def names(self) -> list[str]:
        """The samples of the manifest, in order."""
        return list(self._manifest.samples)

    def load(self, name: str) -> Tensors:
        """All artifacts of a sample, on the CPU, each verified, in memory of its own.

        Raises DataError for a sample that the manifest does not have, and, naming the sample, RecordMissingError for
        one that is not cached or RecordCorruptError for one that was; the corrupt record is in quarantine then, and
        counts as missing in the next plan.
        """
        return {artifact: self.artifact(name, artifact) for artifact in self._keys(name)}

    def artifact(self, name: str, artifact: str) -> torch.Tensor:
        """One artifact of a sample, in memory of its own; raises as `load` does."""
        keys = self._keys(name)
        if artifact not in keys:
            raise DataError(f"sample {name!r} has no artifact {artifact!r}; it has {', '.join(keys)}")
        with _named(name, artifact):
            return self._records.read(keys[artifact])

    def prefetch(self, batches: Iterable[Sequence[str]], threads: int = 2) -> Iterator[list[Tensors]]:
        """`load` for one batch of names after another, in order, at least two batches ahead of the caller.

        The samples of a batch share a buffer, which is used for another batch once no tensor of this one is left: what
        you hold stays as it is, and what you let go of costs no new memory. Copies to a GPU that were started with
        `non_blocking=True` on the current stream count as holding.

        An error is raised where its batch would have been given out; closing the iterator early stops the reading.
        """
        return read_ahead(batches, self._begin, threads)

    def _begin(self, names: Sequence[str]) -> Reading[list[Tensors]]:
        forms = [self._forms(name) for name in names]
        tensors = iter(carve(self._buffers, [(form.dtype, form.shape) for one in forms for form in one.values()]))
        samples = [{artifact: next(tensors) for artifact in one} for one in forms]
        parts = [partial(self._fill, *each) for each in zip(names, forms, samples, strict=True)]
        return Reading(samples, parts)

    def _fill(self, name: str, forms: Forms, targets: Tensors) -> None:
        """Read a sample's artifacts, those that others share rows with first."""
        keys = self._keys(name)
        read: dict[str, torch.Tensor] = {}  # by key

        def base(key: str) -> torch.Tensor:
            return read[key] if key in read else self._records.read(key)

        for artifact, form in sorted(forms.items(), key=lambda item: item[1].base_key is not None):
            key, target = keys[artifact], targets[artifact]
            with _named(name, artifact):
                if target.dtype == form.dtype:
                    self._records.read_into(target, key, form, base)
                    read[key] = target
                else:  # a mask that is not stored as bool
                    target.copy_(self._records.read(key) != 0)

    def _forms(self, name: str) -> Forms:
        forms = {}
        for artifact, key in self._keys(name).items():
            with _named(name, artifact):
                forms[artifact] = self._records.form(key)
        return forms

    def _keys(self, name: str) -> Mapping[str, str]:
        samples = self._manifest.samples
        if name not in samples:
            raise DataError(f"no sample {name!r} among the {len(samples)} of the manifest")
        return samples[name]


class CachedBatches(CachedSamples):
    """Reads samples of a manifest as batches: every artifact of B samples is one tensor, read into place.

    A batch is a dict of tensors `(B, ...)`, padded and masked as `collate.columns` says.
    """

    def batch(self, names: Sequence[str]) -> Tensors:
        """One batch, read by the calling thread; raises as `load` does, and DataError as `collate.columns` does."""
        reading = self._begin_batch(names)
        for part in reading.parts:
            part()
        return reading.batch

    def prefetch_batches(self, batches: Iterable[Sequence[str]], threads: int = 2) -> Iterator[Tensors]:
        """`batch` for one list of names after another, as `prefetch` does it."""
        return read_ahead(batches, self._begin_batch, threads)

    def _begin_batch(self, names: Sequence[str]) -> Reading[Tensors]:
        forms = [self._forms(name) for name in names]
        plan = columns(names, [{artifact: (form.dtype, form.shape) for artifact, form in one.items()} for one in forms])
        tensors = carve(self._buffers, [(column.dtype, column.shape) for column in plan.values()])
        batch = dict(zip(plan, tensors, strict=True))
        fill_masks(batch, plan)
        parts = [
            partial(self._fill_row, name, one, batch, plan, row)
            for row, (name, one) in enumerate(zip(names, forms, strict=True))
        ]
        return Reading(batch, parts)

    def _fill_row(self, name: str, forms: Forms, batch: Tensors, plan: Mapping[str, Column], row: int) -> None:
        self._fill(name, forms, {artifact: own_rows(batch[artifact], plan[artifact], row) for artifact in forms})


@contextmanager
def _named(name: str, artifact: str) -> Iterator[None]:
    """Let errors of records say which sample they are of."""
    try:
        yield
    except RecordMissingError as error:
        raise RecordMissingError(f"sample {name!r}, {artifact}: {error}") from error
    except RecordCorruptError as error:
        raise RecordCorruptError(f"sample {name!r}, {artifact}: {error}") from error
