"""Buckets are those of the pipelines."""

from __future__ import annotations

import math

import pytest
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from hypothesis import given, settings
from hypothesis import strategies as st

from dittocache.data.buckets import Buckets, bucket_size

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


STEPS = st.sampled_from([16, 32, 64])
FRAMES = st.tuples(st.integers(128, 2048), st.integers(128, 2048))


@settings(deadline=None)
@given(SIDES, SIDES, FRAMES, STEPS)
def test_buckets_have_the_area_of_their_frame_and_the_ratio_of_their_picture(
    width: int, height: int, frame: tuple[int, int], step: int
) -> None:
    found = Buckets(frame, step).size_of(width, height)
    area = frame[0] * frame[1]
    ideal = math.sqrt(area * width / height), math.sqrt(area * height / width)
    assert all(side % step == 0 and side >= step for side in found)
    if min(ideal) >= step / 2:  # a narrower picture is one step wide, and its bucket larger than the frame
        assert all(abs(side - best) <= step / 2 * 1.0001 for side, best in zip(found, ideal, strict=True))
        half = step / 2 * 1.0001
        assert abs(found[0] * found[1] - area) <= half * sum(ideal) + half**2
        least = (ideal[0] - half) / (ideal[1] + half)
        assert least <= found[0] / found[1] <= (ideal[0] + half) / max(ideal[1] - half, step)


@settings(deadline=None)
@given(SIDES, SIDES, FRAMES, STEPS, st.booleans())
def test_without_upscaling_no_side_grows(
    width: int, height: int, frame: tuple[int, int], step: int, keep_ratio: bool
) -> None:
    enlarging = Buckets(frame, step, True, keep_ratio).size_of(width, height)
    found = Buckets(frame, step, False, keep_ratio).size_of(width, height)
    for side, own, largest in zip(found, (width, height), enlarging, strict=True):
        assert side % step == 0 and side <= max(own, step) and side <= largest
        assert side == largest or side == max(step, own // step * step)


@settings(deadline=None)
@given(SIDES, SIDES, STEPS)
def test_a_picture_smaller_than_the_frame_keeps_its_own_size_without_upscaling(
    width: int, height: int, step: int
) -> None:
    frame = 16384, 16384
    assert Buckets(frame, step, upscale=False).size_of(width, height) == (
        max(step, width // step * step),
        max(step, height // step * step),
    )


@settings(deadline=None)
@given(SIDES, SIDES, FRAMES, STEPS)
def test_without_buckets_all_pictures_have_one_size(width: int, height: int, frame: tuple[int, int], step: int) -> None:
    found = Buckets(frame, step, keep_ratio=False).size_of(width, height)
    assert found == Buckets(frame, step, keep_ratio=False).size_of(1, 1)
    assert all(abs(side - wanted) <= step / 2 and side % step == 0 for side, wanted in zip(found, frame, strict=True))


def test_sizes_worked_out_by_hand() -> None:
    assert Buckets((1024, 1024), 16).size_of(300, 200) == (1248, 832)
    assert Buckets((960, 544), 16).size_of(1920, 1080) == (960, 544)
    assert Buckets((960, 544), 16).size_of(1000, 1000) == (720, 720)
    assert Buckets((1024, 1024), 16, upscale=False).size_of(300, 200) == (288, 192)
    assert Buckets((1024, 1024), 64, upscale=False).size_of(2000, 40) == (1984, 64)
    assert Buckets((512, 512), 32, keep_ratio=False).size_of(300, 4000) == (512, 512)
    assert Buckets((512, 512), 32, upscale=False, keep_ratio=False).size_of(300, 4000) == (288, 512)
