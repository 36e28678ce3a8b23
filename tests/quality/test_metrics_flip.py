"""FLIP against the reference implementation's numbers, and what the paper promises of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from dittocache.errors import DataError
from dittocache.quality.metrics_flip import PIXELS_PER_DEGREE, flip, flip_map

PICTURES = arrays(np.uint8, (12, 15, 3))


def gradient() -> np.ndarray:
    y, x = np.mgrid[0:96, 0:128]
    return np.stack([(x * 2) % 256, (y * 2) % 256, (x + y) % 256], axis=-1).astype(np.uint8)


def grey(level: int) -> np.ndarray:
    return np.full((48, 64, 3), level, dtype=np.uint8)


def with_square(level: int, colour: tuple[int, int, int]) -> np.ndarray:
    picture = grey(level)
    picture[10:30, 20:40] = colour
    return picture


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [  # of flip-evaluator 1.7, which filters in float32
        (gradient(), 255 - gradient(), 0.894636),
        (gradient(), np.roll(gradient(), 2, axis=1), 0.103056),
        (grey(120), with_square(120, (200, 60, 60)), 0.108508),
        (np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8), 0.967395),
    ],
    ids=["inverted", "moved by two pixels", "a red square", "black and white"],
)
def test_the_reference_implementation_says_the_same(first: np.ndarray, second: np.ndarray, expected: float) -> None:
    assert flip(first, second) == pytest.approx(expected, abs=3e-4)


def test_green_and_blue_are_as_far_apart_as_colours_can_be() -> None:
    green, blue = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    green[..., 1], blue[..., 2] = 255, 255
    assert flip(green, blue) == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(PICTURES, PICTURES)
def test_it_is_symmetric_and_between_0_and_1(first: np.ndarray, second: np.ndarray) -> None:
    found = flip_map(first, second)
    assert found.shape == (12, 15)
    assert 0.0 <= found.min() <= found.max() <= 1.0 + 1e-12
    assert np.array_equal(found, flip_map(second, first))


@settings(max_examples=15, deadline=None)
@given(PICTURES)
def test_equal_pictures_differ_by_nothing(picture: np.ndarray) -> None:
    assert flip(picture, picture.copy()) == 0.0


def test_a_stronger_difference_counts_more() -> None:
    found = [flip(grey(120), grey(120 + step)) for step in (0, 1, 5, 20, 60)]
    assert found == sorted(found)
    assert found[0] == 0.0 < found[1]


def test_only_where_it_is_seen() -> None:
    found = flip_map(grey(120), with_square(120, (200, 60, 60)))
    assert found[15:25, 25:35].min() > 0.3
    assert found[40:, :].max() < 1e-9


def test_from_farther_away_fine_noise_is_seen_less() -> None:
    rng = np.random.default_rng(0)
    noisy = (120 + rng.normal(0, 20, (48, 64, 3))).clip(0, 255).astype(np.uint8)
    assert flip(grey(120), noisy, 4 * PIXELS_PER_DEGREE) < 0.7 * flip(grey(120), noisy)


def test_other_sizes_are_an_error() -> None:
    with pytest.raises(DataError, match="different sizes"):
        flip(grey(1), grey(1)[:-1])
