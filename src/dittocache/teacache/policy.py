"""When a step is computed: pure decisions from numbers, replayable and free of tensors.

TeaCache, https://liewfeng.github.io/TeaCache/: rescaled distances p(d) between the inputs of neighbouring steps are
added up since the last computed step; while the sum stays below the threshold, the step is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

FIRST_STEPS = "one of the first steps"
LAST_STEPS = "one of the last steps"
THRESHOLD_ZERO = "the threshold is 0"
SCHEDULED = "the schedule says so"
SKIPS_IN_A_ROW = "as many skips in a row as allowed"
NO_DISTANCE = "nothing to compare with yet"
NOT_FINITE = "the distance is not a finite number"
BEYOND_RANGE = "the distance is beyond the fitted range"
REACHED = "the accumulated distance reached the threshold"
BELOW = "the accumulated distance is below the threshold"


@dataclass(frozen=True)
class GatePolicy:
    """What the decision depends on besides the run.

    Attributes:
        threshold: accumulated rescaled distance from which a step is computed; 0 computes every step.
        coefficients: rescaling polynomial, highest power first, of any degree.
        fitted_range: (lowest, highest) distance that the polynomial was fitted on.
        ret_steps: first steps that are always computed.
        cutoff_steps: last steps that are always computed.
        max_consecutive_skips: a step is computed after so many skipped ones.
    """

    threshold: float
    coefficients: tuple[float, ...] = (1.0, 0.0)
    fitted_range: tuple[float, float] | None = None
    ret_steps: int = 1
    cutoff_steps: int = 1
    max_consecutive_skips: int = 4


@dataclass(frozen=True)
class GateState:
    """What a run remembers from step to step: the accumulated rescaled distance, and the skips in a row."""

    accumulated: float = 0.0
    skips: int = 0


@dataclass(frozen=True)
class Decision:
    """Compute or skip, why, and the distance `d` that it was decided on."""

    compute: bool
    cause: str
    distance: float | None = None


def forced(policy: GatePolicy, state: GateState, step: int, steps: int | None) -> Decision | None:
    """The decision where no distance can change it, so that none need be measured; None where one is needed.

    `step` counts from 0; `steps` is None where the length of the run is unknown.
    """
    if policy.threshold <= 0:
        return Decision(True, THRESHOLD_ZERO)
    return forced_by_place(policy, state.skips, step, steps)


class Limits(Protocol):
    """What every gate obeys, whatever it measures: see `GatePolicy`."""

    @property
    def ret_steps(self) -> int: ...

    @property
    def cutoff_steps(self) -> int: ...

    @property
    def max_consecutive_skips(self) -> int: ...


def forced_by_place(policy: Limits, skips: int, step: int, steps: int | None) -> Decision | None:
    """The decision where the step's place in the run settles it; None where it does not."""
    if step < policy.ret_steps:
        return Decision(True, FIRST_STEPS)
    if steps is not None and step >= steps - policy.cutoff_steps:
        return Decision(True, LAST_STEPS)
    if skips >= policy.max_consecutive_skips:
        return Decision(True, SKIPS_IN_A_ROW)
    return None


def decide(
    policy: GatePolicy, state: GateState, distance: float | None, step: int, steps: int | None
) -> tuple[Decision, GateState]:
    """Decide on a step and give the state after it.

    `distance` is the relative L1 distance to the step before, None where there is none to compare with.
    """
    decision = forced(policy, state, step, steps)
    if decision is not None:
        return decision, GateState()
    if distance is None:
        return Decision(True, NO_DISTANCE), GateState()
    if not math.isfinite(distance):
        return Decision(True, NOT_FINITE, distance), GateState()
    if policy.fitted_range is not None and distance > policy.fitted_range[1]:
        return Decision(True, BEYOND_RANGE, distance), GateState()
    accumulated = state.accumulated + rescale(policy, distance)
    if not accumulated < policy.threshold:  # also where it is NaN
        return Decision(True, REACHED, distance), GateState()
    return Decision(False, BELOW, distance), GateState(accumulated, state.skips + 1)


def rescale(policy: GatePolicy, distance: float) -> float:
    """max(0, p(d)), with d raised to the lowest distance that p was fitted on.

    Without the clamp a polynomial that is negative somewhere takes back distance that was already accumulated.
    """
    lowest = distance if policy.fitted_range is None else max(distance, policy.fitted_range[0])
    value = polynomial(policy.coefficients, lowest)
    return value if math.isnan(value) else max(0.0, value)


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """c[0] x^n + ... + c[n] by Horner's rule."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def skippable_steps(limits: Limits, steps: int, computed_first: int = 1) -> int:
    """How many of `steps` a run could skip at best, where the first `computed_first` are needed to predict from."""
    open_steps = max(0, steps - max(limits.ret_steps, computed_first) - limits.cutoff_steps)
    return open_steps - open_steps // (limits.max_consecutive_skips + 1)
