"""Pictures that a visitor sends: checked by their headers before anything is decoded, kept under names of our own."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from dittocache.errors import AccessError

MAX_UPLOAD_BYTES = 64 * 2**20
MAX_UPLOAD_PIXELS = 64_000_000
"""Of one picture: 8000 x 8000. Decoded, that is 192 MB."""

KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""PIL's names of the formats that are taken: those of data sets."""


def checked_picture(content: bytes, name: str) -> Image.Image:
    """The picture, upright and RGB, as `families.pictures.open_picture` reads files.

    Args:
        content: the file's bytes.
        name: what the visitor calls it, for errors only.

    Raises AccessError where it is too large as a file or decoded, of another kind, or damaged.
    """
    if len(content) > MAX_UPLOAD_BYTES:
        found = f"{len(content) / 2**20:.1f} MiB; at most {MAX_UPLOAD_BYTES // 2**20} MiB are taken"
        raise AccessError(f"{name!r} is too large: {found}. Copy it into one of the Studio's folders instead")
    try:
        with Image.open(io.BytesIO(content), formats=KINDS) as picture:  # reads the header alone
            width, height = picture.size
            if width * height > MAX_UPLOAD_PIXELS:
                raise AccessError(
                    f"{name!r} would be {width} x {height} pixels; at most {MAX_UPLOAD_PIXELS:,} pixels are taken. "
                    "Send a smaller copy"
                )
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError as error:
        kinds = ", ".join(KINDS)
        raise AccessError(f"{name!r} is not a picture, or of another kind than {kinds}; convert it first") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise AccessError(f"{name!r} cannot be read ({error}); it may be damaged: save it anew") from error


def keep_picture(content: bytes, name: str, folder: Path) -> Path:
    """Write the checked picture into `folder` as a PNG named by its content, and return the file.

    The visitor's name never becomes part of a path, and nothing of the file but its pixels is kept.
    Raises what `checked_picture` raises, and OSError where the folder cannot be written.
    """
    picture = checked_picture(content, name)
    file = folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.png"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            picture.save(stream, "PNG")
        Path(temporary).chmod(0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file
