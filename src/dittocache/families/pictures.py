"""Read pictures as diffusers users do: upright (EXIF), RGB, resized as the pipelines' image processors resize.

Nothing here needs torch or diffusers, so that a process that only decodes starts in a few milliseconds; a test holds
each step equal, bit for bit, to what diffusers does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from dittocache.errors import DataError

# Part of every recipe in which a picture plays a role; change it when `open_picture` changes what it returns.
READING: Mapping[str, str] = {"mode": "RGB", "exif": "transposed"}
RESAMPLING = "lanczos"  # the default of the pipelines' VaeImageProcessor


@dataclass(frozen=True)
class PictureRequest:
    """A picture file and the size that an encoder wants it in: `size`, or an area with the sides' multiple.

    Without either it keeps about its own size.

    Attributes:
        path: the file.
        size: (width, height) in pixels.
        area: in pixels; the picture's aspect ratio is kept as far as `multiple` lets it.
        multiple: both sides become multiples of this many pixels.
        flipped: mirrored left-right after reading.
        cropped: scaled to cover `size` and cut at the centre, instead of being stretched to it.
    """

    path: Path
    size: tuple[int, int] | None = None
    area: int | None = None
    multiple: int = 32
    flipped: bool = False
    cropped: bool = False


Pictures = Callable[[PictureRequest], Image.Image]


def open_picture(path: Path) -> Image.Image:
    """The picture turned upright and as RGB, as `diffusers.utils.load_image` does; raises DataError naming the file."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"picture {path} does not exist; the data set names it") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"picture {path} cannot be read ({error}); replace it or remove its sample") from error


def resized_picture(request: PictureRequest) -> Image.Image:
    """The picture in the size asked for, as `VaeImageProcessor.resize` makes it; raises DataError naming the file."""
    picture = open_picture(request.path)
    if request.flipped:
        picture = ImageOps.mirror(picture)
    size = requested_size(request, lambda _: picture.size)
    if request.cropped:
        return ImageOps.fit(picture, size, method=Image.Resampling.LANCZOS)
    return picture.resize(size, resample=Image.Resampling.LANCZOS)


def requested_size(request: PictureRequest, size_of: Callable[[Path], tuple[int, int]]) -> tuple[int, int]:
    """(width, height) in pixels that `resized_picture` gives the picture; `size_of` gives the file's upright size."""
    if request.size is not None:
        return request.size
    width, height = size_of(request.path)
    return fitted_size(width, height, request.area or width * height, request.multiple)


def request_facts(request: PictureRequest) -> dict[str, Any]:
    """What a recipe says of how a picture gets from its file to an encoder, beside its content; JSON values only."""
    size: dict[str, Any] = {"size": list(request.size)} if request.size else {"multiple": request.multiple}
    if request.area is not None:
        size["area"] = request.area
    return {**size, "resampling": RESAMPLING, **READING, **variant_facts(request)}


def variant_facts(request: PictureRequest) -> dict[str, bool]:
    """What a recipe says of a picture that is mirrored or cut; empty for one that is neither, as it always was."""
    facts = {"flipped": request.flipped, "cropped": request.cropped}
    return {name: True for name, holds in facts.items() if holds}


def fitted_size(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """(width, height) of about `area` pixels in the ratio given: the edit pipelines' `calculate_dimensions`.

    No side becomes less than `multiple`; the pipelines, which ask for nothing so narrow, would fail with a side of 0.
    """
    ratio = width / height
    new_width = math.sqrt(area * ratio)
    sides = round(new_width / multiple) * multiple, round(new_width / ratio / multiple) * multiple
    return max(sides[0], multiple), max(sides[1], multiple)
