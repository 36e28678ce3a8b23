"""PSNR and SSIM against arithmetic, not against themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dittocache.errors import DataError
from dittocache.quality.metrics import PSNR_CAP, capped, psnr, ssim


def grey(level: int, width: int = 16, height: int = 12) -> np.ndarray:
    return np.full((height, width, 3), level, dtype=np.uint8)


@given(st.integers(0, 255), st.integers(0, 255))
def test_psnr_of_a_constant_difference_is_twenty_logs_of_255_over_it(first: int, second: int) -> None:
    found = psnr(grey(first), grey(second))
    if first == second:
        assert found == math.inf
    else:
        # MSE is (a - b)^2; a difference taken in uint8 would wrap and fail here
        assert found == pytest.approx(20 * math.log10(255 / abs(first - second)), abs=1e-9)


def test_psnr_counts_every_pixel_and_channel() -> None:
    first = grey(100)
    second = first.copy()
    second[0, 0, 1] = 110  # one value of 12 * 16 * 3 is 10 off: MSE = 100 / 576
    assert psnr(first, second) == pytest.approx(10 * math.log10(255**2 * 576 / 100), abs=1e-9)


def test_black_against_white_is_zero_decibels() -> None:
    assert psnr(grey(0), grey(255)) == pytest.approx(0.0, abs=1e-12)


def test_the_cap_lies_above_the_smallest_difference_of_small_pictures_and_only_caps() -> None:
    first = np.zeros((128, 128, 3), dtype=np.uint8)
    second = first.copy()
    second[5, 5, 0] = 1
    assert 90 < psnr(first, second) < PSNR_CAP
    assert capped(math.inf) == PSNR_CAP
    assert capped(31.5) == 31.5


def test_images_and_arrays_and_greys_compare_alike() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(2))
    assert psnr(Image.fromarray(first), second) == psnr(first, Image.fromarray(second)) == psnr(first, second)
    level = first[:, :, 0]
    assert psnr(Image.fromarray(level), np.repeat(level[:, :, None], 3, axis=2)) == math.inf
    assert psnr(level, Image.fromarray(level).convert("RGB")) == math.inf


def test_ssim_of_constant_pictures_is_the_luminance_term() -> None:
    # without variance only (2 a b + C1) / (a^2 + b^2 + C1) is left, C1 = (0.01 * 255)^2
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(grey(100), grey(150)) == pytest.approx(expected, abs=1e-9)


def test_ssim_is_one_for_itself_and_falls_with_noise() -> None:
    rng = np.random.default_rng(1)
    picture = np.kron(rng.integers(40, 210, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    little, much = (
        np.clip(picture + rng.normal(0, sigma, picture.shape), 0, 255).astype(np.uint8) for sigma in (3, 30)
    )
    assert ssim(picture, picture) == 1.0
    assert 1.0 > ssim(picture, little) > ssim(picture, much)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_different_sizes_are_refused_with_both_sizes(metric) -> None:
    with pytest.raises(DataError, match=r"16x12 and 12x16 \(width x height\)"):
        metric(grey(0, 16, 12), grey(0, 12, 16))


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (Image.new("RGBA", (16, 12)), "transparency"),
        (Image.new("F", (16, 12)), "mode 'F'"),
        (np.zeros((12, 16, 3), dtype=np.float32), "float32"),
        (np.zeros((12, 16, 4), dtype=np.uint8), r"\(12, 16, 4\)"),
        (np.zeros((3, 12, 16), dtype=np.uint8), r"\(3, 12, 16\)"),
    ],
)
def test_values_that_are_not_8_bit_rgb_are_refused(picture, said: str) -> None:
    with pytest.raises(DataError, match=said):
        psnr(picture, grey(0))


def test_empty_pictures_are_refused_rather_than_nan() -> None:
    with pytest.raises(DataError, match="empty"):
        psnr(grey(0, 0, 0), grey(0, 0, 0))


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(DataError, match="11x11"):
        ssim(grey(0, 10, 20), grey(0, 10, 20))
