"""The search with its verification: what was found, how sure it is, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dittocache.quality.tuning.curve import Point, point_of
from dittocache.quality.tuning.measurement import Ledger, Measurement, Sample, values_of
from dittocache.quality.tuning.search import Candidate, beside, search
from dittocache.quality.tuning.settings import PLAIN, Method, Setting
from dittocache.quality.tuning.target import Promise, Target

TIMED = 3


@dataclass(frozen=True)
class Choice:
    """A setting that keeps to the target on tuning and on held-out samples.

    Attributes:
        tuning, held_out: what was measured on them.
        wall: speed-up by wall time of the whole call, measured in pairs; None where it was not.
        refused: settings further along the sweep that kept to it on the tuning samples and failed on the held-out ones.
    """

    setting: Setting
    tuning: Sequence[Measurement]
    held_out: Sequence[Measurement]
    wall: float | None
    refused: int


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        best: the best setting of all; None where nothing keeps to the target.
        cache: the best one with a cache, which is `best` unless plain steps beat it.
        plain: fewer plain steps that keep to the target, as the search on the tuning samples found them.
        measured: every setting that was tried on all tuning samples.
    """

    target: Target
    promise: Promise
    best: Choice | None
    cache: Choice | None
    plain: Candidate | None
    measured: tuple[Point, ...]

    @property
    def words(self) -> str:
        """The finding in a sentence."""
        if self.best is None:
            return f"no setting keeps to {self.target}; leave the step cache off"
        point = point_of(self.best.setting, self.best.held_out)
        wall = "" if self.best.wall is None else f" ({self.best.wall:.2f}x by the clock)"
        found = f"{self.best.setting.label}: {point.speedup:.2f}x{wall}, {point.figures} on held-out pictures"
        if self.best.setting.method == PLAIN:
            beaten = "no cache keeps to it" if self.cache is None else f"no better is {self.cache.setting.label}"
            return f"{found}. Fewer plain steps beat every cache here ({beaten})"
        if self.plain is None:
            return f"{found}. No number of fewer plain steps keeps to {self.target}"
        plain = point_of(self.plain.setting, self.plain.measured)
        return f"{found}. Without a cache: {self.plain.setting.knob}, {plain.speedup:.2f}x, {plain.figures}"


def tune(
    target: Target,
    promise: Promise,
    methods: Sequence[Method],
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    ledger: Ledger,
    timed: int = TIMED,
) -> Tuned:
    """Find the best setting that keeps to `target`, and verify it on samples that the search has not seen.

    Where the held-out samples refuse a setting, the next one of its sweep is looked at: a milder one for a target of
    quality, a harsher one for a target of speed.

    Args:
        methods: the sweeps.
        samples, held_out: two or more each.
        ledger: runs and remembers.
        timed: held-out samples that the chosen settings are timed on, beside the uncached run.
    """
    found = search(methods, target, promise, lambda setting: ledger.measure(setting, samples))
    choices: list[Choice] = []
    for candidate in found:  # the best first; a later one counts only if the ones before were refused
        is_cache = candidate.method.name != PLAIN
        if not choices or (is_cache and all(one.setting.method == PLAIN for one in choices)):
            choice = _verified(candidate, target, promise, samples, held_out, ledger, timed)
            if choice is not None:
                choices.append(choice)
    cache = next((one for one in choices if one.setting.method != PLAIN), None)
    tried = ledger.settings_of([setting for method in methods for setting in method.settings], samples)
    return Tuned(
        target=target,
        promise=promise,
        best=choices[0] if choices else None,
        cache=cache,
        plain=next((one for one in found if one.method.name == PLAIN), None),
        measured=tuple(point_of(setting, ledger.measure(setting, samples)) for setting in tried),
    )


def _verified(
    candidate: Candidate,
    target: Target,
    promise: Promise,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    ledger: Ledger,
    timed: int,
) -> Choice | None:
    refused = 0
    looked_at: Candidate | None = candidate
    while looked_at is not None:
        measured = ledger.measure(looked_at.setting, held_out)
        every = values_of(target.metric, [*looked_at.measured, *measured])
        if target.kept_by(values_of(target.metric, measured), promise) and target.promised_by(every, promise):
            wall = ledger.wall_speedup(looked_at.setting, held_out[:timed]) if timed else None
            return Choice(looked_at.setting, looked_at.measured, measured, wall, refused)
        refused += 1
        looked_at = beside(looked_at, target, lambda setting: ledger.measure(setting, samples))
    return None
