"""Targets as people write them, and bounds that hold as often as they say."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from dittocache.quality.tuning.target import CONFIDENCE, Target, bound, goodness, student_t


@pytest.mark.parametrize(
    ("text", "metric", "value"),
    [
        ("psnr>=35", "psnr", 35.0),
        (" SSIM >= 0.97 ", "ssim", 0.97),
        ("flip<=5e-2", "flip", 0.05),
        ("speedup>=2", "speedup", 2),
    ],
)
def test_targets_are_read_as_written(text: str, metric: str, value: float) -> None:
    found = Target.parse(text)
    assert (found.metric, found.value) == (metric, value)
    assert Target.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lpips>=1", "no target; expected psnr>=35"),
        ("psnr", "no target"),
        ("psnr<=35", "psnr takes >=, found '<='"),
        ("flip>=0.1", "flip takes <=, found '>='"),
        ("ssim>=1.5", "between -1 and 1, found 1.5"),
        ("speedup>=0.5", "between 1 and 1000"),
        ("psnr>=1.2.3", "is no number"),
    ],
)
def test_others_are_refused_with_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target.parse(text)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 15, 60])
@pytest.mark.parametrize("probability", [0.9, 0.95, 0.975])
def test_students_quantiles(probability: float, freedom: int) -> None:
    assert student_t(probability, freedom) == pytest.approx(student.ppf(probability, freedom), rel=5e-3)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_the_bound_holds_for_as_many_unseen_pictures_as_it_says(count: int) -> None:
    rng, rounds = random.Random(count), 4000
    kept = {"each": 0, "mean": 0}
    for _ in range(rounds):
        values = [rng.gauss(50, 4) for _ in range(count)]
        kept["each"] += rng.gauss(50, 4) >= bound("psnr", values, "each")
        kept["mean"] += rng.gauss(50, 4 / math.sqrt(count)) >= bound("psnr", values, "mean")
    for share in (kept["each"] / rounds, kept["mean"] / rounds):
        assert share == pytest.approx(CONFIDENCE, abs=0.01)


VALUES = {
    "psnr": st.floats(10, 99),
    "ssim": st.floats(0, 0.9999),
    "flip": st.floats(1e-4, 1),
    "speedup": st.floats(1, 10),
}


@pytest.mark.parametrize("metric", VALUES)
@pytest.mark.parametrize("promise", ["each", "mean"])
def test_a_bound_is_never_better_than_the_mean(metric: str, promise: str) -> None:
    @given(st.lists(VALUES[metric], min_size=2, max_size=6))
    def check(values: list[float]) -> None:
        good = sum(goodness(metric, value) for value in values) / len(values)
        assert goodness(metric, max(bound(metric, values, promise), 1e-9)) <= good + 1e-6

    check()


def test_a_picture_that_fails_breaks_the_promise_of_each_but_not_of_the_mean() -> None:
    target, values = Target.parse("psnr>=35"), [34.9, *[60.0, 60.5, 59.5] * 4]
    assert not target.kept_by(values, "each")
    assert target.kept_by(values, "mean")
    assert not target.promised_by(values, "each")


def test_a_wide_spread_promises_less_than_the_worst_picture_shows() -> None:
    target = Target.parse("psnr>=35")
    assert target.kept_by([36, 50, 64], "each")
    assert not target.promised_by([36, 50, 64], "each")
    assert target.promised_by([49, 50, 51], "each")


def test_pictures_in_which_nothing_was_skipped_do_not_widen_the_spread() -> None:
    assert Target.parse("psnr>=35").promised_by([100.0, 58.0, 100.0, 61.0, 57.0, 100.0], "each")
    assert not Target.parse("psnr>=35").promised_by([100.0, 36.0, 100.0, 37.0, 36.5, 100.0], "each")


def test_flip_is_better_when_lower() -> None:
    target = Target.parse("flip<=0.05")
    assert target.promised_by([0.010, 0.011, 0.009, 0.010], "each")
    assert not target.promised_by([0.010, 0.011, 0.049, 0.010], "each")
    assert bound("flip", [0.010, 0.011, 0.009], "each") > 0.011
