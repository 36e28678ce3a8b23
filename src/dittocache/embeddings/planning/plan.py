"""Plan before work: which records a data set needs, which are there, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittocache.data.digests import ContentIndex, Snapshot
from dittocache.data.sample import Sample
from dittocache.embeddings.planning.causes import causes
from dittocache.embeddings.planning.identity import encoder_identity
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.recipe import Recipe, artifact_recipe, recipe_key
from dittocache.embeddings.store.store import Store
from dittocache.errors import DataError, StoreUnavailableError
from dittocache.families.base import Family, Sizes

NEW = "new"
ABSENT = "missing in the store, or damaged"


@dataclass(frozen=True)
class Need:
    """What one sample needs of one encoder: artifact name -> key."""

    sample: Sample
    keys: Mapping[str, str]


@dataclass(frozen=True)
class Miss:
    """A record that has to be encoded, and why.

    Attributes:
        sample, artifact: the first of those that need it.
        key: under which it will be stored.
        cause: `new`, `missing in the store, or damaged`, or what changed: `caption changed`, ...
        stale: True where an earlier record was made for this sample's artifact that no longer fits.
    """

    sample: str
    artifact: str
    key: str
    cause: str
    stale: bool


@dataclass(frozen=True)
class Plan:
    """What a data set needs and what the store has of it, in records.

    Attributes:
        manifest: of the run, once everything missing is encoded.
        needs: by encoder (None for plain facts), for every sample in order.
        sizes, model, dtype: what the keys were computed for.
        stored: bytes of each needed record that is there.
        missed: the records to encode, each once however many samples share it.
        removed: samples of the previous manifest that the data set no longer has.
        orphans: records in the store that the previous manifest used and this one does not.
        snapshot: the content digests that the keys stand for.
        notes: what the user should know besides.
    """

    manifest: Manifest
    needs: Mapping[str | None, Sequence[Need]]
    sizes: Sizes
    model: str
    dtype: torch.dtype
    stored: Mapping[str, int]
    missed: Sequence[Miss]
    removed: Sequence[str]
    orphans: int
    snapshot: Snapshot
    notes: Sequence[str] = ()

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
        return [miss for miss in self.missed if miss.stale]

    @property
    def bytes_stored(self) -> int:
        """Bytes of the records that are needed and there."""
        return sum(self.stored.values())

    def missing(
        self, encoder: str | None, done: Collection[str] = frozenset(), failed: Collection[str] = frozenset()
    ) -> list[Sample]:
        """The samples that `encoder` must see so that all of its records exist; one for each shared record.

        Args:
            done: keys that were stored since the plan was made.
            failed: names of samples that cannot be encoded; another sample that shares a record takes their place.
        """
        covered = {*self.stored, *done}
        chosen = []
        for need in self.needs.get(encoder, ()):
            if need.sample.name not in failed and not covered.issuperset(need.keys.values()):
                covered.update(need.keys.values())
                chosen.append(need.sample)
        return chosen

    def work(self, encoder: str | None) -> list[Need]:
        """What `encoder` still has to compute: each of its needs of which a record is missing, in order."""
        return [need for need in self.needs.get(encoder, ()) if not self.stored.keys() >= set(need.keys.values())]

    def recipe(self, key: str) -> Recipe:
        """What the record of `key` is made from."""
        return self.manifest.recipes[key]

    def describe(self) -> str:
        """The plan in a few lines for a terminal."""
        samples, records = len(self.manifest.samples), self.hits + self.misses
        lines = [f"{samples} samples need {records} records: {self.hits} are cached ({_megabytes(self.bytes_stored)})"]
        lines[0] += f", {self.misses} are to be encoded" if self.misses else ": nothing is left to encode"
        lines += [f"  {count:>6} {cause}" for cause, count in self._causes().most_common()]
        if self.removed:
            lines.append(f"{len(self.removed)} samples are no longer in the data set and will not be trained on")
        if self.orphans:
            lines.append(f"{self.orphans} stored records are no longer used by this data set")
        return "\n".join([*lines, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values; `to_encode` counts samples by encoder (`none` for plain facts)."""
        return {
            "samples": len(self.manifest.samples),
            "hits": self.hits,
            "misses": self.misses,
            "bytes_stored": self.bytes_stored,
            "causes": dict(self._causes()),
            "stale": [{"sample": one.sample, "artifact": one.artifact, "cause": one.cause} for one in self.stale],
            "to_encode": {encoder or "none": len(self.missing(encoder)) for encoder in self.needs},
            "removed": list(self.removed),
            "orphans": self.orphans,
            "notes": list(self.notes),
        }

    def _causes(self) -> Counter[str]:
        return Counter(f"stale: {miss.cause}" if miss.stale else miss.cause for miss in self.missed)


def make_plan(
    samples: Sequence[Sample],
    family: Family,
    sizes: Sizes,
    model: str | Path,
    dtype: torch.dtype,
    store: Store,
    index: ContentIndex,
    previous: Manifest | None = None,
) -> Plan:
    """Work out every key of a data set and look up which records are there; no model is loaded, no picture decoded.

    Args:
        dtype: the data type that the encoders will compute in.
        index: what it learns about files is saved.
        previous: the manifest of an earlier run; with it the plan says why records are stale.

    Raises DataError listing all samples that the family cannot use and all files that cannot be read, ModelError when
    the checkpoint is missing or incomplete.
    """
    identities = {
        encoder: encoder_identity(model, encoder, beside, dtype, index) for encoder, beside in family.encoders.items()
    }
    snapshot = Snapshot(index)
    needs: dict[str | None, list[Need]] = {encoder: [] for encoder in (*family.encoders, None)}
    keys_of: dict[str, dict[str, str]] = {}
    recipes: dict[str, Recipe] = {}
    problems: list[str] = []
    for sample in samples:
        if sample.name in keys_of:
            problems.append(f"two samples are called {sample.name!r}; rename the files of one of them")
            continue
        by_encoder: dict[str | None, dict[str, str]] = {}
        try:
            for artifact in family.artifacts(sample, sizes):
                identity = None if artifact.encoder is None else identities[artifact.encoder]
                recipe = artifact_recipe(artifact, family.name, identity, snapshot)
                key = recipe_key(recipe)
                recipes[key] = recipe
                by_encoder.setdefault(artifact.encoder, {})[artifact.name] = key
        except DataError as error:
            problems.append(str(error))
            continue
        for encoder, keys in by_encoder.items():
            needs[encoder].append(Need(sample, keys))
        keys_of[sample.name] = {name: key for keys in by_encoder.values() for name, key in keys.items()}
    notes = _save(index)
    if problems:
        raise DataError(f"{len(problems)} sample(s) cannot be cached", problems)
    manifest = Manifest(keys_of, recipes, family.name)
    stored = store.sizes(recipes)
    before = previous if previous is not None else Manifest({})
    return Plan(
        manifest=manifest,
        needs=needs,
        sizes=sizes,
        model=str(model),
        dtype=dtype,
        stored=stored,
        missed=_misses(manifest, stored, before),
        removed=[name for name in before.samples if name not in keys_of],
        orphans=len(store.sizes(before.keys - manifest.keys)),
        snapshot=snapshot,
        notes=notes,
    )


def _misses(manifest: Manifest, stored: Collection[str], previous: Manifest) -> list[Miss]:
    found: dict[str, Miss] = {}
    for sample, keys in manifest.samples.items():
        earlier_keys = previous.samples.get(sample, {})
        for artifact, key in keys.items():
            if key in stored or key in found:
                continue
            earlier = earlier_keys.get(artifact)
            if earlier is None:
                found[key] = Miss(sample, artifact, key, NEW, stale=False)
            elif earlier == key:
                found[key] = Miss(sample, artifact, key, ABSENT, stale=False)
            else:
                changes = causes(previous.recipes.get(earlier, {}), manifest.recipes[key])
                found[key] = Miss(sample, artifact, key, ", ".join(changes), stale=True)
    return list(found.values())


def _save(index: ContentIndex) -> list[str]:
    """A cache that can only be read is no reason not to plan with it, and none for silence either."""
    try:
        index.save()
    except StoreUnavailableError as error:
        return [f"files will be read again by the next plan: {error}"]
    return []


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
