"""When references are computed anew, and how far their drift is followed: functions of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.policy import EXACT, REACH, Kept, RefreshRule, even_refreshes, refresh_now, slope_weight
from dittocache.referencekv.rules import rule_of


def pattern(rule: RefreshRule, steps: int, skipped: frozenset[int] = frozenset()) -> str:
    """`F` a full step, `c` a cached one, `.` one that the step cache skips."""
    kept, marks = None, ""
    for step in range(steps):
        if step in skipped:
            marks += "."
            continue
        full = refresh_now(rule, step, kept)
        kept = Kept(0, step) if full else Kept(kept.reused + 1, kept.step) if kept else None
        marks += "F" if full else "c"
    return marks


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (EXACT, "Fccccccc"),
        (RefreshRule(every=1), "FFFFFFFF"),
        (RefreshRule(every=2), "FcFcFcFc"),
        (RefreshRule(every=3), "FccFccFc"),
        (RefreshRule(every=99), "Fccccccc"),
        (RefreshRule(steps=(0,)), "Fccccccc"),
        (RefreshRule(steps=(0, 2, 5)), "FcFccFcc"),
    ],
)
def test_pattern(rule: RefreshRule, expected: str) -> None:
    assert pattern(rule, 8) == expected


@given(st.integers(1, 12), st.integers(1, 60))
def test_every_nth_step_is_full(refresh: int, steps: int) -> None:
    expected = "".join("F" if step % refresh == 0 else "c" for step in range(steps))
    assert pattern(RefreshRule(every=refresh), steps) == expected


@given(st.integers(1, 6), st.integers(1, 40), st.frozensets(st.integers(1, 39)))
def test_every_nth_step_counts_computed_steps_only(refresh: int, steps: int, skipped: frozenset[int]) -> None:
    marks = pattern(RefreshRule(every=refresh), steps, skipped).replace(".", "")
    assert marks == pattern(RefreshRule(every=refresh), len(marks))


@given(st.integers(1, 40), st.frozensets(st.integers(0, 39)), st.frozensets(st.integers(1, 39)))
def test_a_named_step_that_is_skipped_is_made_up_for_at_the_next_computed_one(
    steps: int, named: frozenset[int], skipped: frozenset[int]
) -> None:
    marks = pattern(RefreshRule(steps=tuple(sorted(named | {0}))), steps, skipped)
    since = -1
    for step, mark in enumerate(marks):
        if mark == ".":
            continue
        assert (mark == "F") == (step == 0 or any(since < name <= step for name in named | {0}))
        since = step


@given(
    drift=st.floats(1e-6, 10),
    over=st.floats(1e-3, 1),
    distances=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    tolerance=st.floats(1e-6, 10),
)
def test_adaptive_refreshes_once_the_drift_in_proportion_is_beyond_the_tolerance(
    drift: float, over: float, distances: list[float], tolerance: float
) -> None:
    rule = RefreshRule(tolerance=tolerance)
    near, far = (refresh_now(rule, 5, Kept(1, 3, drift, over, distance)) for distance in sorted(distances))
    assert near <= far  # later is never milder
    assert far == (drift * max(distances) / over > tolerance)


def test_adaptive_begins_with_two_full_steps_to_have_something_to_measure() -> None:
    rule = RefreshRule(tolerance=1e9)
    assert refresh_now(rule, 0, None)
    assert refresh_now(rule, 1, Kept(0, 0))
    assert not refresh_now(rule, 2, Kept(0, 1, 0.05, 0.1, 0.1))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 4))
def test_the_line_is_never_followed_backwards_nor_beyond_its_reach(
    newest: float, older: float, sigma: float, reach: float
) -> None:
    assert 0 <= slope_weight([newest, older], sigma, reach) <= reach
    assert slope_weight([newest], sigma) == slope_weight([], sigma) == 0


def test_within_its_reach_it_is_a_line_in_sigma() -> None:
    assert slope_weight([0.75, 1.0], 0.75) == 0
    assert slope_weight([0.75, 1.0], 0.625) == 0.5
    assert slope_weight([0.75, 1.0], 0.5) == 1.0
    assert slope_weight([0.75, 1.0], 0.0) == REACH  # the first steps say nothing of the last ones


@given(st.integers(1, 60), st.integers(1, 60))
def test_even_refreshes(steps: int, count: int) -> None:
    found = even_refreshes(steps, min(count, steps))
    assert len(found) == min(count, steps) and found[0] == 0
    served = [after - before for before, after in zip(found, [*found[1:], steps], strict=True)]
    assert max(served) - min(served) <= 1


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, "F"), (4, "FFcc"), (8, "FcFccFcc"), (12, "FcccFcccFccc"), (None, "FcccFcccFccc")],
)
def test_what_is_usual(steps: int | None, expected: str) -> None:
    assert pattern(rule_of(ReferenceKVConfig(), steps, exact=False), len(expected)) == expected


def test_the_settings_name_the_rule() -> None:
    assert rule_of(ReferenceKVConfig(), 8, exact=True) == EXACT
    assert rule_of(ReferenceKVConfig(mode="approx"), 8, exact=True) == rule_of(ReferenceKVConfig(), 8, exact=False)
    assert rule_of(ReferenceKVConfig(refresh=3), 8, exact=False) == RefreshRule(every=3, extrapolate=True)
    assert rule_of(ReferenceKVConfig(refresh=3, extrapolate=False), 8, exact=False) == RefreshRule(every=3)
    adaptive = ReferenceKVConfig(refresh="adaptive", drift_tolerance=0.3)
    assert rule_of(adaptive, 8, exact=False) == RefreshRule(tolerance=0.3, extrapolate=True)
    assert rule_of(ReferenceKVConfig(refresh=(0, 3)), 8, exact=False) == RefreshRule(steps=(0, 3), extrapolate=True)
