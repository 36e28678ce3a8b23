"""Plan before work: which records a data set needs, which are there, and why the others are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dittocache.data.digests import ContentIndex
from dittocache.data.file_memory import remember
from dittocache.data.file_samples import FileSamples
from dittocache.data.sample import Sample
from dittocache.data.sample_sets import SampleSets
from dittocache.data.snapshot import Snapshot
from dittocache.embeddings.planning.estimate import BytesEstimate, estimate_bytes
from dittocache.embeddings.planning.identity import encoder_identity, model_folder
from dittocache.embeddings.planning.keyindex import StoredRecords
from dittocache.embeddings.planning.keys import KeyMaker
from dittocache.embeddings.planning.keytable import KeyTable, Row
from dittocache.embeddings.planning.lookup import record_lengths
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.planning.memory import plan_files
from dittocache.embeddings.planning.misses import ABSENT, NEW, Miss, Misses, find_misses
from dittocache.embeddings.planning.needs import Need, Needs
from dittocache.embeddings.planning.rates import Forecast, Rates
from dittocache.embeddings.planning.report import describe, plan_as_dict
from dittocache.embeddings.recipe import Recipe
from dittocache.embeddings.store.storage import Storage
from dittocache.embeddings.store.store import Store
from dittocache.errors import DataError, DittocacheError, StoreUnavailableError
from dittocache.families.base import Batching, Family, Sizes
from dittocache.families.estimates import size_estimator

__all__ = ["ABSENT", "NEW", "Miss", "Need", "Plan", "make_plan"]

NATIVE = Storage()


@dataclass(frozen=True)
class Plan:
    """What a data set needs and what the store has of it, in records.

    Attributes:
        manifest: of the run, once everything missing is encoded.
        needs: by encoder (None for plain facts), for every sample in order.
        sizes, model, dtype, storage, batching: what the keys were computed for.
        stored: bytes of each needed record that is there.
        missed: the records to encode, each once however many samples share it.
        removed: samples of the previous manifest that the data set no longer has.
        orphans: records in the store that the previous manifest used and this one does not.
        snapshot: the content digests that the keys stand for.
        notes: what the user should know besides.
        forecast: what is needed to tell how many bytes and seconds are still to come.
    """

    manifest: Manifest
    needs: Mapping[str | None, Needs]
    sizes: Sizes
    model: str
    dtype: torch.dtype
    storage: Storage
    stored: StoredRecords
    missed: Misses
    removed: Sequence[str]
    orphans: int
    snapshot: Snapshot
    notes: Sequence[str] = ()
    batching: Batching = "exact"
    forecast: Forecast = Forecast()

    @property
    def hits(self) -> int:
        """Records that are needed and there."""
        return len(self.stored)

    @property
    def misses(self) -> int:
        """Records that are needed and not there; stale ones are among them."""
        return len(self.missed)

    @property
    def stale(self) -> list[Miss]:
        """The misses for which an earlier record exists that no longer fits."""
        return self.missed.stale

    @property
    def bytes_stored(self) -> int:
        """Bytes of the records that are needed and there."""
        return self.stored.bytes

    @cached_property
    def bytes_to_write(self) -> BytesEstimate | None:
        """About how many bytes the missing records will take; None where the family or checkpoint cannot tell."""
        estimator = self.forecast.estimator
        if estimator is None:
            return None
        try:
            return estimate_bytes(
                self.forecast.samples,
                self.manifest.table,
                self.missed,
                estimator,
                self.sizes,
                self.dtype,
                self.snapshot.size,
            )
        except (DittocacheError, OSError, ValueError):
            return None  # a guess is not worth a failure; encoding says what is wrong with the checkpoint

    @cached_property
    def seconds_to_encode(self) -> Mapping[str, float | None]:
        """About how long each encoder that has work will take on its device; None where that was never measured."""
        found = {}
        for encoder in self.needs:
            count = 0 if encoder is None else len(self.missing(encoder))
            if encoder is not None and count:
                each = self.forecast.seconds_per_sample(encoder, self.dtype, self.sizes)
                found[encoder] = None if each is None else each * count
        return found

    @cached_property
    def _present(self) -> npt.NDArray[np.bool_]:
        """For each key of the manifest's table whether its record is there."""
        return self.stored.present

    def missing(
        self, encoder: str | None, done: Collection[str] = frozenset(), failed: Collection[str] = frozenset()
    ) -> list[Sample]:
        """The samples that `encoder` must see so that all of its records exist; one for each shared record.

        Args:
            done: keys that were stored since the plan was made.
            failed: names of samples that cannot be encoded; another sample that shares a record takes their place.
        """
        covered = set(done)
        chosen = []
        for need in self.work(encoder):
            wanted = {key for key in need.keys.values() if key not in covered and key not in self.stored}
            if wanted and need.sample.name not in failed:
                covered |= wanted
                chosen.append(need.sample)
        return chosen

    def work(self, encoder: str | None) -> list[Need]:
        """What `encoder` still has to compute: each of its needs of which a record is missing, in order."""
        needs = self.needs.get(encoder)
        return [] if needs is None else [needs.of_row(row) for row in needs.rows_without(self._present)]

    def hits_of(self, encoders: Collection[str | None]) -> int:
        """Records that these encoders make and that are there."""
        found = [np.flatnonzero(self.needs[one].ours & self._present) for one in encoders if one in self.needs]
        return len(np.unique(self.manifest.index.distinct_of[np.concatenate(found)])) if found else 0

    def recipe(self, key: str) -> Recipe:
        """What the record of `key` is made from."""
        return self.manifest.recipes[key]

    def describe(self) -> str:
        """The plan in a few lines for a terminal."""
        return describe(self)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values; `to_encode` counts samples by encoder (`none` for plain facts)."""
        return plan_as_dict(self)


def make_plan(
    samples: Sequence[Sample],
    family: Family,
    sizes: Sizes,
    model: str | Path,
    dtype: torch.dtype,
    store: Store,
    index: ContentIndex,
    previous: Manifest | None = None,
    storage: Storage = NATIVE,
    batching: Batching = "exact",
    rates: Rates | None = None,
    devices: Mapping[str, str] | None = None,
    held_in: Mapping[str, str] | None = None,
) -> Plan:
    """Work out every key of a data set and look up which records are there; no model is loaded, no picture decoded.

    Args:
        dtype: the data type that the encoders will compute in.
        index: what it learns about files is saved.
        previous: the manifest of an earlier run; with it the plan says why records are stale.
        storage: the form in which records are stored.
        batching: `together` where samples are to pass an encoder together; see `Family.encode`.
        rates: how long earlier encodings took, for the time needed.
        devices: where each encoder will run; `cpu` where it is not named.
        held_in: the format that an encoder's weights are held in while encoding, where that is not `dtype`.

    Raises DataError listing all samples that the family cannot use and all files that cannot be read, ModelError when
    the checkpoint is missing or incomplete.
    """
    identities = {
        encoder: encoder_identity(model, encoder, beside, dtype, index) for encoder, beside in family.encoders.items()
    }
    if batching == "together":  # the last bits depend on the batch, so these are other encoders
        identities = {encoder: {**identity, "batching": batching} for encoder, identity in identities.items()}
    for encoder, form in (held_in or {}).items():
        identities[encoder] = {**identities[encoder], "held_in": form}
    parts = samples.parts if isinstance(samples, SampleSets) else [samples]
    snapshot = Snapshot(index, [part.table for part in parts if isinstance(part, FileSamples)])
    maker = KeyMaker(family, sizes, identities, snapshot, storage, snapshot.size)
    table, problems, notes = _table_of_parts(parts, maker, model)
    notes += _save(index)
    if problems:
        raise DataError(f"{len(problems)} sample(s) cannot be cached", problems)
    manifest = Manifest.of_table(table, family.name)
    before = previous if previous is not None else Manifest({})
    lengths = record_lengths(store, manifest.index.keys)
    return Plan(
        manifest=manifest,
        needs={encoder: Needs(samples, table, encoder) for encoder in (*family.encoders, None)},
        sizes=sizes,
        model=str(model),
        dtype=dtype,
        storage=storage,
        stored=StoredRecords(manifest.index, lengths),
        missed=find_misses(table, manifest.index, lengths, before.table),
        removed=_removed(before.table, table),
        orphans=_orphans(store, before, manifest),
        snapshot=snapshot,
        notes=notes,
        batching=batching,
        forecast=Forecast(
            samples,
            size_estimator(family.name, model_folder(model)),
            rates,
            {encoder: identity["class"][1] for encoder, identity in identities.items()},
            dict(devices or {}),
        ),
    )


def _table_of_parts(
    parts: Sequence[Sequence[Sample]], maker: KeyMaker, model: str | Path
) -> tuple[KeyTable, list[str], list[str]]:
    """The keys of all samples, what is wrong with those that have none, and notes."""
    table, problems, notes = KeyTable.of([]), [], []
    for number, part in enumerate(parts):
        if isinstance(part, FileSamples) and part.memory is not None:
            found, wrong, told = plan_files(part, maker, part.memory, model)
            remember(part)
            told = [*part.notes, *told]
        else:
            (found, wrong), told = _table(part, maker), []
        table = found if number == 0 else table.joined(found)
        problems += wrong
        notes += told
    return table, problems, notes


def _table(samples: Sequence[Sample], maker: KeyMaker) -> tuple[KeyTable, list[str]]:
    """The keys of all samples, and what is wrong with those that have none."""
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for sample in samples:
        if sample.name in rows:
            problems.append(f"two samples are called {sample.name!r}; rename the files of one of them")
            continue
        try:
            rows[sample.name] = maker.row(sample)
        except DataError as error:
            problems.append(str(error))
    return KeyTable.of(rows.values()), problems


def _removed(before: KeyTable, now: KeyTable) -> list[str]:
    if before.names == now.names:
        return []
    return [name for name in before.names if name not in now.row_of]


def _orphans(store: Store, before: Manifest, now: Manifest) -> int:
    """How many records that the previous manifest used are in the store and no longer used."""
    left = before.index.keys[~now.index.contains(before.index.keys)]
    return int((record_lengths(store, left) >= 0).sum())


def _save(index: ContentIndex) -> list[str]:
    """A cache that can only be read is no reason not to plan with it, and none for silence either."""
    try:
        index.save()
    except StoreUnavailableError as error:
        return [f"files will be read again by the next plan: {error}"]
    return []
