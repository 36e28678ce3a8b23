"""Read pictures as diffusers users do: upright (EXIF), RGB."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dittocache.errors import DataError

# Part of every recipe in which a picture plays a role; change it when `open_picture` changes what it returns.
READING: Mapping[str, str] = {"mode": "RGB", "exif": "transposed"}


def open_picture(path: Path) -> Image.Image:
    """The picture turned upright and as RGB, by `diffusers.utils.load_image`; raises DataError naming the file."""
    from diffusers.utils.loading_utils import load_image

    try:
        with Image.open(path) as picture:
            upright: Image.Image = load_image(picture)
            return upright
    except FileNotFoundError as error:
        raise DataError(f"picture {path} does not exist; the data set names it") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"picture {path} cannot be read ({error}); replace it or remove its sample") from error
