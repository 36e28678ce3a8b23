"""Which records a plan misses, and the foreign tensor that can be each of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dittocache.data.sample import Sample
from dittocache.embeddings.foreign.expectation import Expected, Widths, check_tensor, dtype_note, expected_of
from dittocache.embeddings.foreign.source import Foreign, ForeignCache
from dittocache.embeddings.planning.plan import Plan
from dittocache.embeddings.store.storage import base_key_of
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError
from dittocache.families.base import Family


@dataclass(frozen=True)
class Wanted:
    """A record that the plan misses."""

    sample: Sample
    artifact: str
    key: str


class Matcher:
    """Foreign tensors, checked against what the plan expects of each."""

    def __init__(self, cache: ForeignCache, plan: Plan, store: Store, family: Family) -> None:
        self.family = family
        self._cache = cache
        self._plan = plan
        self._store = store
        self._widths = Widths(plan.model)
        self._expected: tuple[str, Expected] | None = None

    def wanted(self) -> Iterator[Wanted]:
        """What the plan misses; a record that others share rows with comes before them."""
        for encoder in (*self.family.encoders, None):
            for need in self._plan.work(encoder):
                missing = [item for item in need.keys.items() if item[1] not in self._plan.stored]
                missing.sort(key=lambda item: base_key_of(self._plan.recipe(item[1])) is not None)
                yield from (Wanted(need.sample, artifact, key) for artifact, key in missing)

    def read(self, one: Wanted, done: Collection[str | None]) -> Foreign:
        """The tensor of a record; raises CacheError or DataError where there is none that can be used."""
        sample = one.sample
        files = [sample.target, *sample.controls, *([sample.mask] if sample.mask else [])]
        changed = [file for file in files if self._plan.snapshot.changed_since(file)]
        if changed:
            raise CacheError(f"{changed[0]} has changed since the plan was made: plan again")
        recipe = self._plan.recipe(one.key)
        base = base_key_of(recipe)
        if base is not None and base not in done and base not in self._store:
            raise CacheError("it is to share rows with the empty prompt's embedding, which is not there")
        if recipe["encoder"] is None:  # shapes and loss masks are not taken on trust: they cost next to nothing
            [facts] = self.family.encode(None, None, [sample], self._plan.sizes, wanted=[{one.artifact}])
            return Foreign(facts[one.artifact], "", ())
        if recipe["transform"].get("flipped"):
            raise CacheError(f"{self._cache.tool} caches pictures as they are, and this sample's are mirrored")
        expected = self.expected(sample)
        foreign = self._cache.read(sample, one.artifact, recipe, expected)
        check_tensor(one.artifact, foreign.tensor, recipe, expected, self._widths)
        note = dtype_note(foreign.tensor, recipe)
        return Foreign(foreign.tensor, foreign.file, (*foreign.notes, *([note] if note else [])))

    def expected(self, sample: Sample) -> Expected:
        """The sample's sizes; looked up once for all artifacts in a row."""
        if self._expected is None or self._expected[0] != sample.name:
            self._expected = (sample.name, expected_of(self.family, sample, self._plan.sizes))
        return self._expected[1]

    def provenance(self, foreign: Foreign) -> dict[str, object] | None:
        """What the record is to say of where it comes from; None for what was computed here."""
        if not foreign.file:
            return None
        fields = {"imported_from": self._cache.tool, "file": foreign.file, "unverified": list(self._cache.unverified)}
        return {**fields, "notes": list(foreign.notes)}
