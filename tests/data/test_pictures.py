"""The size that a header promises is the size that reading the picture gives, and no pixel is decoded for it."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps, PngImagePlugin

from dittocache.data.pictures import picture_size

ROTATED = 6  # EXIF orientation: turn by 90 degrees


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(path: Path, exif: str) -> Path:
    """A PNG of 40 x 20 pixels whose EXIF stands nowhere, before or behind the pixels."""
    turned = Image.Exif()
    turned[0x0112] = ROTATED
    options = {"exif": turned} if exif == "before" else {}
    Image.effect_noise((40, 20), 60).save(path, **options)
    if exif == "behind":
        content = path.read_bytes()
        end = content.rindex(_chunk(b"IEND", b""))
        block = turned.tobytes().removeprefix(b"Exif\x00\x00")
        path.write_bytes(content[:end] + _chunk(b"eXIf", block) + content[end:])
    return path


@pytest.mark.parametrize(("exif", "size"), [("none", (40, 20)), ("before", (20, 40)), ("behind", (20, 40))])
def test_size_of_a_png_is_the_size_after_turning_it_upright(tmp_path: Path, exif: str, size: tuple[int, int]) -> None:
    path = _png(tmp_path / "a.png", exif)
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
    assert upright.size == size
    assert picture_size(path) == size


def test_no_pixel_of_a_plain_png_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PngImagePlugin.PngImageFile) -> None:
        raise AssertionError("the pixels were decoded")

    path = _png(tmp_path / "a.png", "before")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", refuse)
    assert picture_size(path) == (20, 40)
