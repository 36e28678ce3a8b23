"""Difference maps and contact sheets."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dittocache.errors import DataError
from dittocache.quality.pictures import amplification, contact_sheet, data_uri, difference, difference_map


def flat(level: int, width: int = 8, height: int = 6) -> np.ndarray:
    return np.full((height, width, 3), level, dtype=np.uint8)


def test_difference_is_the_largest_channel_and_does_not_wrap() -> None:
    other = flat(200)
    other[2, 3] = (199, 0, 201)
    found = difference(flat(200), other)
    assert found[2, 3] == 200
    assert found.sum() == 200


def test_equal_is_darkest_and_the_map_brightens_with_the_difference_until_it_clips() -> None:
    steps = flat(0, width=5)
    steps[:, :, 0] = [0, 10, 20, 30, 60]
    found = np.asarray(difference_map(flat(0, width=5), steps, factor=8).convert("L")).astype(int)[0]
    assert found[0] < found[1] < found[2] < found[3] <= found[4]
    clipped = difference_map(flat(0), flat(40), factor=8).getpixel((0, 0))
    assert clipped == difference_map(flat(0), flat(255), factor=1).getpixel((0, 0))


@pytest.mark.parametrize(("level", "factor"), [(0, 32), (7, 32), (8, 16), (31, 8), (60, 4), (255, 1)])
def test_amplification_is_the_largest_power_of_two_that_does_not_clip(level: int, factor: int) -> None:
    assert amplification([(flat(0), flat(level))]) == factor


def test_amplification_is_one_for_all_and_the_largest_difference_decides() -> None:
    assert amplification([(flat(0), flat(1)), (flat(0), flat(60))]) == 4


def test_a_factor_below_one_is_refused() -> None:
    with pytest.raises(DataError, match="at least 1"):
        difference_map(flat(0), flat(1), factor=0)


def test_contact_sheet_places_rows_and_centres_smaller_pictures() -> None:
    sheet = contact_sheet([flat(10), flat(20), flat(30, width=4, height=2)], columns=2, gap=2)
    assert sheet.size == (2 * 8 + 3 * 2, 2 * 6 + 3 * 2)
    assert sheet.getpixel((2, 2)) == (10, 10, 10)
    assert sheet.getpixel((12, 2)) == (20, 20, 20)
    assert sheet.getpixel((4, 12)) == (30, 30, 30)
    assert sheet.getpixel((2, 10)) == (255, 255, 255)
    assert sheet.getpixel((12, 12)) == (255, 255, 255)


@pytest.mark.parametrize(("pictures", "columns"), [([], 2), ([flat(0)], 0)])
def test_an_empty_contact_sheet_is_refused(pictures, columns: int) -> None:
    with pytest.raises(DataError, match="at least one"):
        contact_sheet(pictures, columns)


def test_data_uri_keeps_every_pixel_and_shrinks_only_large_pictures() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))

    def decoded(largest_side: int) -> Image.Image:
        prefix, _, encoded = data_uri(picture, largest_side).partition(",")
        assert prefix == "data:image/png;base64"
        return Image.open(io.BytesIO(base64.b64decode(encoded)))

    assert np.array_equal(np.asarray(decoded(40)), np.asarray(picture))
    assert decoded(20).size == (20, 15)
    assert picture.size == (40, 30)
