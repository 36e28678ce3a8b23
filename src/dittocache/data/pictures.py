"""What a picture file says about itself in its header, without decoding it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dittocache.errors import DataError

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
_ORIENTATION = 0x0112  # EXIF tag
_SIDES_SWAPPED = frozenset({5, 6, 7, 8})


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of the picture once it is turned upright (EXIF), from its header alone.

    A header that promises more pixels than PIL takes for a decompression bomb is refused before anything is decoded.
    Raises DataError naming the file when it is missing, no picture, or such a bomb.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            swapped = picture.getexif().get(_ORIENTATION, 1) in _SIDES_SWAPPED
    except FileNotFoundError as error:
        raise DataError(f"picture {path} does not exist; the data set names it") from error
    except UnidentifiedImageError as error:
        raise DataError(f"picture {path} cannot be read: it is no picture, or a damaged one; replace it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"picture {path} cannot be read ({error}); replace it") from error
    return (height, width) if swapped else (width, height)
