"""Pictures of the allowed folders for the browser: small copies made when they are first asked for, and the files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

from fastapi import Response
from fastapi.responses import FileResponse, PlainTextResponse
from PIL import Image, ImageOps, UnidentifiedImageError

from dittocache.data.pictures import ENDINGS
from dittocache.errors import AccessError, DataError
from dittocache.studio.roots import Roots
from dittocache.studio.state import Studio

SIDES = (96, 256, 768)
"""Longest sides in pixels that small copies are made in."""

_FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable"}


def thumbnail_url(path: Path, side: int = 256) -> str:
    """Where the browser finds the small copy of a picture; another address once the file has changed."""
    return "/thumbnail?" + urlencode({"path": os.fspath(path), "side": side, "version": _version(path)})


def picture_url(path: Path) -> str:
    """Where the browser finds a picture itself; another address once the file has changed."""
    return "/picture?" + urlencode({"path": os.fspath(path), "version": _version(path)})


def endpoints(studio: Studio) -> dict[str, Callable[..., Response]]:
    """What answers these addresses. Only pictures inside the allowed folders are served."""

    def thumbnail(path: str, side: int = 256, version: str = "") -> Response:
        try:
            file = make_thumbnail(studio.roots, path, side, studio.thumbnails)
        except AccessError as error:
            return PlainTextResponse(f"{error}\n", status_code=403)
        except DataError as error:
            return PlainTextResponse(f"{error}\n", status_code=404)
        return FileResponse(file, media_type="image/webp", headers=_FOR_EVER if version else None)

    def picture(path: str, version: str = "") -> Response:
        try:
            file = _allowed_picture(studio.roots, path)
        except AccessError as error:
            return PlainTextResponse(f"{error}\n", status_code=403)
        except DataError as error:
            return PlainTextResponse(f"{error}\n", status_code=404)
        return FileResponse(file, headers=_FOR_EVER if version else None)

    return {"/thumbnail": thumbnail, "/picture": picture}


def make_thumbnail(roots: Roots, path: str | Path, side: int, folder: Path) -> Path:
    """The small copy of a picture, upright, WebP, from `folder` or made now.

    Args:
        side: longest side in pixels, one of `SIDES`.

    Raises AccessError outside the allowed folders, DataError for what is no picture, or another side.
    """
    file = _allowed_picture(roots, path)
    if side not in SIDES:
        raise DataError(f"found side {side}; small pictures are made with {', '.join(map(str, SIDES))} pixels")
    digest = hashlib.blake2b(f"{file}\0{_version(file)}\0{side}".encode(errors="surrogateescape"), digest_size=16)
    name = digest.hexdigest()
    place = folder / name[:2] / f"{name}.webp"
    if place.is_file():
        return place
    try:
        with Image.open(file) as picture:
            picture.draft("RGB", (side, side))
            small = ImageOps.exif_transpose(picture)
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            small = small if small.mode in ("RGB", "RGBA") else small.convert("RGBA" if "A" in small.mode else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"picture {file} cannot be read ({error}); replace it") from error
    _write(small, place)
    return place


def _allowed_picture(roots: Roots, path: str | Path) -> Path:
    file = roots.allowed(path)
    if file.suffix.lower() not in ENDINGS or not file.is_file():
        raise DataError(f"there is no picture {file}; pictures end in {', '.join(sorted(ENDINGS))}")
    return file


def _write(picture: Image.Image, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=place.parent, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            picture.save(stream, "WEBP", quality=82, method=2)
        os.replace(temporary, place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _version(path: Path) -> str:
    """Tells the file's present content from former ones; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"
