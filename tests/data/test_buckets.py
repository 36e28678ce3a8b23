"""Buckets are those of the pipelines."""

from __future__ import annotations

import pytest
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from hypothesis import given, settings
from hypothesis import strategies as st

from dittocache.data.buckets import bucket_size

SIDES = st.integers(16, 8192)


@settings(deadline=None)
@given(SIDES, SIDES, st.sampled_from([128, 384, 512, 1024, 1328]))
def test_a_bucket_is_what_the_edit_pipelines_calculate(width: int, height: int, resolution: int) -> None:
    calculated = calculate_dimensions(resolution**2, width / height)
    if min(calculated) > 0:
        assert bucket_size(width, height, resolution, 32) == calculated


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(32, 2048), st.sampled_from([8, 16, 32, 64]))
def test_sides_are_positive_multiples_near_the_area_and_the_ratio(
    width: int, height: int, resolution: int, multiple: int
) -> None:
    bucket = bucket_size(width, height, resolution, multiple)
    ratio = (width / height) ** 0.5
    for side, ideal in zip(bucket, (resolution * ratio, resolution / ratio), strict=True):
        assert side % multiple == 0
        assert side == multiple if ideal < multiple / 2 else abs(side - ideal) <= multiple / 2 * 1.0001


@pytest.mark.parametrize("resolution", [128, 1024])
def test_a_square_keeps_its_resolution(resolution: int) -> None:
    assert bucket_size(300, 300, resolution, 32) == (resolution, resolution)
