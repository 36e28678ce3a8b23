"""Finds the best setting of each sweep by bisection, and the best of them all; what is measured is asked for."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dittocache.quality.tuning.measurement import Measurement, mean_speedup, values_of
from dittocache.quality.tuning.settings import Method, Setting
from dittocache.quality.tuning.target import Promise, Target, bound

Measure = Callable[[Setting], Sequence[Measurement]]
"""Measurements of a setting, one a sample; asked twice, it answers from memory."""


@dataclass(frozen=True)
class Candidate:
    """A setting that keeps the promise on the samples that it was tried on, and its place in its sweep."""

    method: Method
    index: int
    measured: Sequence[Measurement]

    @property
    def setting(self) -> Setting:
        return self.method.settings[self.index]

    @property
    def speedup(self) -> float:
        return mean_speedup(self.measured)


def search(methods: Sequence[Method], target: Target, promise: Promise, measure: Measure) -> list[Candidate]:
    """The best setting of each sweep that keeps to the target, the best of all first; sweeps without one are left out.

    For a target of quality the fastest, for a target of speed the one of highest quality.
    """
    found = []
    limit = mildest if target.metric == "speedup" else harshest
    for method in methods:

        def keeps(index: int, method: Method = method) -> bool:
            return target.promised_by(values_of(target.metric, measure(method.settings[index])), promise)

        index = limit(len(method.settings), keeps)
        if index is not None:
            found.append(Candidate(method, index, measure(method.settings[index])))
    if target.metric == "speedup":
        return sorted(found, key=lambda one: -quality(one.measured, promise))
    return sorted(found, key=lambda one: (-round(one.speedup, 2), -quality(one.measured, promise)))


def beside(candidate: Candidate, target: Target, measure: Measure) -> Candidate | None:
    """The next setting of its sweep that keeps to the target more surely; None at the end of the sweep."""
    index = candidate.index + (1 if target.metric == "speedup" else -1)
    if not 0 <= index < len(candidate.method.settings):
        return None
    return Candidate(candidate.method, index, measure(candidate.method.settings[index]))


def harshest(count: int, keeps: Callable[[int], bool]) -> int | None:
    """The largest index that keeps, where those below a limit keep and those above do not; None where none does."""
    low, high = -1, count
    while high - low > 1:
        middle = (low + high) // 2
        if keeps(middle):
            low = middle
        else:
            high = middle
    return low if low >= 0 else None


def mildest(count: int, keeps: Callable[[int], bool]) -> int | None:
    """The smallest index that keeps, where those above a limit keep and those below do not; None where none does."""
    found = harshest(count, lambda index: not keeps(index))
    index = 0 if found is None else found + 1
    return index if index < count else None


def quality(measured: Sequence[Measurement], promise: Promise) -> float:
    """What an unseen picture's PSNR keeps to, in dB; with a promise for the mean, the mean."""
    values = values_of("psnr", measured)
    return statistics.fmean(values) if promise == "mean" else bound("psnr", values, "each")
