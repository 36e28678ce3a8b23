"""When a step is computed, told from how wrong the prediction would be: no calibration, no polynomial.

At a computed step i the truth v_i of what is predicted is known, and so is what the line through the computed steps j
and k before it would have said. Their distance, divided by |(s_i - s_j)(s_i - s_k)|, is the local curvature C of the
path in sigma (the error term of polynomial interpolation, with one point fewer where the last value alone is reused). A
step skipped at s is then wrong by C |(s - s_i)(s - s_j)|, and the picture moves by |ds| times that. These are added up
over the skipped steps; before the sum passes the tolerance, a step is computed. Where the noise is predicted, its error
is (1 - s) of the velocity's: early steps, whose errors later ones partly take back, count less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dittocache.teacache.policy import NOT_FINITE, Decision, forced_by_place

CURVATURE_UNKNOWN = "too few steps were computed to know how the path bends"
ERROR_REACHED = "the predicted error reached the tolerance"
ERROR_BELOW = "the predicted error is below the tolerance"


@dataclass(frozen=True)
class ErrorPolicy:
    """What the decision depends on besides the run.

    Attributes:
        tolerance: error that skipped steps may add up to, relative to what is predicted, times the change of sigma.
        order: of the prediction: 0 or 1.
        ret_steps, cutoff_steps, max_consecutive_skips: as in `GatePolicy`.
    """

    tolerance: float
    order: int = 1
    ret_steps: int = 1
    cutoff_steps: int = 1
    max_consecutive_skips: int = 4


@dataclass(frozen=True)
class ErrorState:
    """What a run remembers.

    Attributes:
        computed: sigmas of the last computed steps, the newest first.
        curvature: C of the last computed step; None while unknown.
        accumulated: predicted error of the steps skipped since.
        skips: skipped steps in a row.
    """

    computed: tuple[float, ...] = ()
    curvature: float | None = None
    accumulated: float = 0.0
    skips: int = 0


def decide_by_error(
    policy: ErrorPolicy, state: ErrorState, sigma: float, sigma_next: float, step: int, steps: int | None
) -> tuple[Decision, ErrorState]:
    """Decide on the step at `sigma`, from which the solver goes on to `sigma_next`, and give the state after it."""
    decision = forced_by_place(policy, state.skips, step, steps)
    if decision is None and (state.curvature is None or len(state.computed) <= policy.order):
        decision = Decision(True, CURVATURE_UNKNOWN)
    if decision is not None:
        return decision, replace(state, accumulated=0.0, skips=0)
    assert state.curvature is not None
    error = abs(sigma_next - sigma) * state.curvature * _product(sigma, state.computed[: policy.order + 1])
    accumulated = state.accumulated + error
    if not math.isfinite(accumulated):
        return Decision(True, NOT_FINITE, accumulated), replace(state, accumulated=0.0, skips=0)
    if accumulated >= policy.tolerance:
        return Decision(True, ERROR_REACHED, accumulated), replace(state, accumulated=0.0, skips=0)
    return Decision(False, ERROR_BELOW, accumulated), replace(state, accumulated=accumulated, skips=state.skips + 1)


def after_computed(policy: ErrorPolicy, state: ErrorState, sigma: float, defect: float | None) -> ErrorState:
    """The state after a step at `sigma` was computed and found `defect` (relative) away from its prediction."""
    known = state.computed[: policy.order + 1]
    curvature = state.curvature
    if defect is not None and len(known) == policy.order + 1:
        distance = _product(sigma, known)
        curvature = defect / distance if distance > 0 else None
    return ErrorState((sigma, *known), curvature)


def _product(sigma: float, known: tuple[float, ...]) -> float:
    return math.prod(abs(sigma - one) for one in known)
