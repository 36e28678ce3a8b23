"""The step cache's decisions: what holds for every sequence of distances."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dittocache.families.polynomials import PUBLISHED
from dittocache.teacache import policy as reasons
from dittocache.teacache.policy import Decision, GatePolicy, GateState, decide, polynomial, rescale, skippable_steps

SPEC_POLYNOMIAL = PUBLISHED["qwen-image-spec"]
finite = st.floats(-1e3, 1e3)
policies = st.builds(
    GatePolicy,
    threshold=st.floats(0, 10),
    coefficients=st.lists(finite, min_size=1, max_size=7).map(tuple),
    fitted_range=st.none() | st.tuples(st.floats(0, 0.4), st.floats(0.5, 2)),
    ret_steps=st.integers(1, 4),
    cutoff_steps=st.integers(1, 4),
    max_consecutive_skips=st.integers(1, 6),
)
distances = st.lists(st.floats(0) | st.just(math.nan) | st.floats(0, 1), min_size=1, max_size=60)


def run(policy: GatePolicy, values: list[float], known: bool = True) -> list[Decision]:
    """Decide a run of len(values) steps."""
    state, decisions = GateState(), []
    for step, distance in enumerate(values):
        decision, state = decide(policy, state, distance if step else None, step, len(values) if known else None)
        decisions.append(decision)
    return decisions


@given(policies, distances)
def test_the_first_and_the_last_steps_are_computed(policy: GatePolicy, values: list[float]) -> None:
    decisions = run(policy, values)
    always = decisions[: policy.ret_steps] + decisions[-policy.cutoff_steps :]
    assert all(decision.compute for decision in always)


@given(policies, distances)
def test_no_more_skips_in_a_row_than_allowed_whatever_the_polynomial_says(
    policy: GatePolicy, values: list[float]
) -> None:
    in_a_row = 0
    for decision in run(policy, values, known=False):
        in_a_row = 0 if decision.compute else in_a_row + 1
        assert in_a_row <= policy.max_consecutive_skips


@given(policies, distances)
def test_a_skip_keeps_the_sum_of_positive_distances_below_the_threshold(
    policy: GatePolicy, values: list[float]
) -> None:
    total = 0.0
    for step, decision in enumerate(run(policy, values)):
        if decision.compute:
            total = 0.0
            continue
        added = rescale(policy, values[step])
        assert added >= 0
        total += added
        assert total < policy.threshold


@given(policies, distances)
def test_a_distance_that_means_nothing_is_computed(policy: GatePolicy, values: list[float]) -> None:
    for value, decision in list(zip(values, run(policy, values), strict=True))[1:]:
        beyond = policy.fitted_range is not None and value > policy.fitted_range[1]
        if not math.isfinite(value) or beyond:
            assert decision.compute


@given(policies.map(lambda policy: GatePolicy(0.0, policy.coefficients)), distances)
def test_threshold_zero_computes_every_step(policy: GatePolicy, values: list[float]) -> None:
    assert all(decision.compute for decision in run(policy, values))


@given(st.lists(finite, min_size=1, max_size=8), st.floats(0, 2))
def test_polynomials_of_any_degree_are_numpys(coefficients: list[float], x: float) -> None:
    assert math.isclose(polynomial(coefficients, x), float(np.polyval(coefficients, x)), rel_tol=1e-9, abs_tol=1e-6)


@given(policies, st.integers(1, 60))
def test_skippable_steps_is_what_a_run_without_any_movement_skips(policy: GatePolicy, steps: int) -> None:
    still = GatePolicy(
        policy.threshold,
        ret_steps=policy.ret_steps,
        cutoff_steps=policy.cutoff_steps,
        max_consecutive_skips=policy.max_consecutive_skips,
    )
    skipped = sum(not decision.compute for decision in run(still, [0.0] * steps))
    assert skipped == (skippable_steps(still, steps) if policy.threshold > 0 else 0)


def test_the_specs_polynomial_cannot_skip_for_ever() -> None:
    # First distance of a real Qwen-Image run is 0.587, where the polynomial is far below 0. Added up as it is, the
    # sum never comes back above 0: every step but the first would be skipped.
    values = [0.0, 0.587, *[0.1] * 48]
    raw, naive = 0.0, 0
    for value in values[1:]:
        raw += polynomial(SPEC_POLYNOMIAL.coefficients, value)
        naive += raw < 0.2
    assert naive == 49

    policy = GatePolicy(0.2, SPEC_POLYNOMIAL.coefficients, SPEC_POLYNOMIAL.fitted_range)
    decisions = run(policy, values)
    assert decisions[1] == Decision(True, reasons.BEYOND_RANGE, 0.587)
    assert sum(not decision.compute for decision in decisions) < 40

    unranged = run(GatePolicy(0.2, SPEC_POLYNOMIAL.coefficients), values)  # a user's own, without a range
    assert sum(decision.compute for decision in unranged) >= 10


def test_the_specs_polynomial_rises_over_the_range_it_is_trusted_on() -> None:
    assert SPEC_POLYNOMIAL.fitted_range is not None
    grid = np.linspace(*SPEC_POLYNOMIAL.fitted_range, 200)
    values = [max(0.0, polynomial(SPEC_POLYNOMIAL.coefficients, float(x))) for x in grid]
    assert values == sorted(values)


def test_the_sum_starts_again_behind_a_computed_step() -> None:
    policy = GatePolicy(0.25)
    compute = [decision.compute for decision in run(policy, [0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])]
    assert compute == [True, False, False, True, False, False, True, True]


def test_a_cause_is_given() -> None:
    policy = GatePolicy(0.25, max_consecutive_skips=1)
    causes = [decision.cause for decision in run(policy, [0.0, 0.1, 0.1, 0.3, math.nan, 0.1])]
    assert causes == [
        reasons.FIRST_STEPS,
        reasons.BELOW,
        reasons.SKIPS_IN_A_ROW,
        reasons.REACHED,
        reasons.NOT_FINITE,
        reasons.LAST_STEPS,
    ]
