"""Pictures made from pictures: difference maps and contact sheets."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dittocache.errors import DataError
from dittocache.quality.metrics import Picture, as_pair, as_pixels

_RAMP_LEVELS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_RAMP_COLOURS = np.array([[8, 10, 20], [84, 24, 96], [196, 56, 70], [248, 152, 56], [255, 250, 205]], dtype=np.float64)
"""Dark to light with rising lightness, so that it also reads in greys and for colour-blind eyes."""

AMPLIFICATIONS = (1, 2, 4, 8, 16, 32)


def difference(a: Picture, b: Picture) -> NDArray[np.uint8]:
    """The largest difference over the three channels, uint8 (H, W). Raises DataError when the sizes differ."""
    first, second = as_pair(a, b)
    largest: NDArray[np.uint8] = np.abs(first.astype(np.int16) - second.astype(np.int16)).max(axis=2).astype(np.uint8)
    return largest


def difference_map(a: Picture, b: Picture, factor: int) -> Image.Image:
    """Where and how much two pictures differ: black where equal, light where |a - b| x factor reaches 255.

    Args:
        factor: amplification of the difference; say it beside the map. One factor for all the maps that are
            compared, see `amplification`.

    Raises:
        DataError: the sizes differ, or the factor is below 1.
    """
    if factor < 1:
        raise DataError(f"the difference is amplified by {factor}; expected a factor of at least 1")
    level = np.minimum(difference(a, b).astype(np.float64) * factor / 255.0, 1.0)  # (H, W)
    channels = [np.interp(level, _RAMP_LEVELS, _RAMP_COLOURS[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=2).round().astype(np.uint8))


def amplification(pairs: Iterable[tuple[Picture, Picture]]) -> int:
    """The largest power of two up to 32 that clips at most 2 % of the differing pixels of any pair.

    One factor for several maps, so that a lighter map is a larger difference.
    """
    allowed = AMPLIFICATIONS[-1]
    for a, b in pairs:
        differences = difference(a, b)
        differing = differences[differences > 0]
        if differing.size:
            high = max(float(np.quantile(differing, 0.98)), 1.0)
            allowed = min(allowed, max(factor for factor in AMPLIFICATIONS if factor == 1 or factor * high <= 255))
    return allowed


def contact_sheet(
    pictures: Sequence[Picture], columns: int, gap: int = 8, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Pictures in rows of `columns`, each centred in a cell as large as the largest picture.

    Args:
        gap: pixels between the cells and around them.

    Raises:
        DataError: no pictures, or fewer than one column.
    """
    if not pictures or columns < 1:
        raise DataError(
            f"a contact sheet of {len(pictures)} pictures in {columns} columns; expected at least one of each"
        )
    tiles = [Image.fromarray(as_pixels(picture)) for picture in pictures]
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), background)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        left = gap + column * (width + gap) + (width - tile.width) // 2
        top = gap + row * (height + gap) + (height - tile.height) // 2
        sheet.paste(tile, (left, top))
    return sheet


def data_uri(picture: Image.Image, largest_side: int) -> str:
    """The picture as a PNG data URI, made smaller where a side is longer than `largest_side` pixels."""
    if max(picture.size) > largest_side:
        picture = picture.copy()
        picture.thumbnail((largest_side, largest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
