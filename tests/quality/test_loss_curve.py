"""The drawn loss curve says what the numbers say."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dittocache.quality.loss_curve import loss_svg, smoothed, smoothing_window, ticks


def test_smoothed_is_the_mean_of_its_window_and_shorter_at_the_ends() -> None:
    found = smoothed([1.0, 2.0, 6.0, 4.0, 10.0], window=3)
    assert found == pytest.approx([1.5, 3.0, 4.0, 20 / 3, 7.0])


def test_smoothed_leaves_out_what_is_not_finite() -> None:
    found = smoothed([1.0, math.nan, 3.0, math.inf], window=3)
    assert found[:3] == pytest.approx([1.0, 2.0, 3.0])
    assert np.isnan(smoothed([math.nan], window=3)).all()


def test_smoothing_window_is_odd_and_at_least_five() -> None:
    assert [smoothing_window(count) for count in (1, 60, 200, 1000)] == [5, 7, 21, 101]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 0.34, 4) == [0.0, 0.1, 0.2, 0.3]
    assert ticks(1, 240, 8) == [50, 100, 150, 200]
    assert ticks(2.0, 2.0, 4) == [2.0]


def test_lower_losses_are_drawn_lower_and_later_steps_further_right() -> None:
    svg = loss_svg([1, 2, 3], [3.0, 2.0, 1.0], 400, 200)
    points = [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", svg)]
    assert len(points) == 3
    assert points == sorted(points)
    assert [y for _, y in points] == sorted(y for _, y in points)
    ElementTree.fromstring(svg)  # well-formed
    assert "Optimizer step" in svg and "Loss" in svg


def test_an_outlier_sits_at_the_edge_and_does_not_press_the_curve_flat() -> None:
    losses = [1.0] * 199 + [1000.0]
    svg = loss_svg(range(1, 201), losses, 400, 200)
    heights = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", svg)]
    assert max(heights) < 200 - 46 and min(heights) >= 12


def test_losses_that_are_not_finite_are_left_out() -> None:
    svg = loss_svg([1, 2, 3], [1.0, math.nan, math.inf], 400, 200)
    assert len(re.findall("h0", svg)) == 1
    assert "nan" not in svg and "inf" not in svg
    assert "nan" not in loss_svg([1], [math.nan], 400, 200)


@pytest.mark.parametrize(("steps", "losses"), [([], []), ([1, 2], [0.5])])
def test_steps_and_losses_must_match(steps, losses) -> None:
    with pytest.raises(ValueError, match="expected as many of each"):
        loss_svg(steps, losses, 400, 200)
