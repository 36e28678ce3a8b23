"""What a picture file says about itself in its header, without decoding it."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dittocache.errors import DataError

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
_ORIENTATION = 0x0112  # EXIF tag
_SIDES_SWAPPED = frozenset({5, 6, 7, 8})
_PNG_SIGNATURE_BYTES = 8
_PNG_METADATA = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})  # chunks that may hold EXIF


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of the picture once it is turned upright (EXIF), from its header alone.

    A header that promises more pixels than PIL takes for a decompression bomb is refused before anything is decoded.
    Raises DataError naming the file when it is missing, no picture, or such a bomb.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            swapped = _exif(picture, path).get(_ORIENTATION, 1) in _SIDES_SWAPPED
    except FileNotFoundError as error:
        raise DataError(f"picture {path} does not exist; the data set names it") from error
    except UnidentifiedImageError as error:
        raise DataError(f"picture {path} cannot be read: it is no picture, or a damaged one; replace it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"picture {path} cannot be read ({error}); replace it") from error
    return (height, width) if swapped else (width, height)


def _exif(picture: Image.Image, path: Path) -> Image.Exif:
    """EXIF without decoding pixels. PIL decodes a whole PNG (24 ms at 1024x1024) in case EXIF stands behind them."""
    if isinstance(picture, PngImagePlugin.PngImageFile):
        with path.open("rb") as stream:
            if not _metadata_behind_pixels(stream):
                return Image.Image.getexif(picture)
    return picture.getexif()


def _metadata_behind_pixels(stream: BinaryIO) -> bool:
    """Whether a PNG has metadata chunks after its first pixel chunk; reads chunk headers only."""
    stream.seek(_PNG_SIGNATURE_BYTES)
    pixels = False
    while len(header := stream.read(8)) == 8:
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        if pixels and kind in _PNG_METADATA:
            return True
        pixels = pixels or kind == b"IDAT"
        stream.seek(length + 4, 1)  # the chunk's data and its checksum
    return False
