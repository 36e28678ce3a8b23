"""Pictures from visitors: which are taken, and that a bomb is refused before it is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from dittocache.errors import AccessError
from dittocache.studio import uploads
from dittocache.studio.uploads import KINDS, MAX_UPLOAD_PIXELS, checked_picture, keep_picture


def _file(kind: str = "PNG", size: tuple[int, int] = (6, 4), **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 30, 10)).save(stream, kind, **options)
    return stream.getvalue()


def _png_promising(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_data_sets_are_taken(kind: str) -> None:
    picture = checked_picture(_file(kind), "a.png")
    assert (picture.size, picture.mode) == ((6, 4), "RGB")


def test_a_picture_is_turned_upright_as_training_reads_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert checked_picture(_file("JPEG", exif=exif), "a.jpg").size == (4, 6)


@pytest.mark.parametrize("sides", [(MAX_UPLOAD_PIXELS // 8000 + 1, 8000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(AccessError, match="bomb.png"):
        checked_picture(_png_promising(*sides), "bomb.png")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"#!/bin/sh\nrm -rf /\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(run me) system\n",
        _file("GIF"),
        _file("ICO"),
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_other_kinds_are_refused_whatever_they_are_called(content: bytes) -> None:
    with pytest.raises(AccessError, match="convert it first"):
        checked_picture(content, "picture.png")


def test_a_damaged_picture_is_refused() -> None:
    with pytest.raises(AccessError, match="save it anew"):
        checked_picture(_file(size=(64, 64))[:-40], "half.png")


def test_a_file_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", 50)
    with pytest.raises(AccessError, match="one of the Studio's folders"):
        checked_picture(_file(size=(200, 200)), "large.png")


def test_a_visitors_name_never_becomes_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    files = {keep_picture(_file(), name, folder) for name in ("../../etc/x.png", "a\0b.png", "/tmp/a.png", "x" * 999)}
    assert {file.parent for file in files} == {folder}
    assert [file.suffix for file in files] == [".png"], "one content is one file"
    assert [path.name for path in tmp_path.iterdir()] == ["uploads"]


def test_only_pixels_are_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "<script>alert(1)</script>"
    kept = keep_picture(_file("JPEG", exif=exif), "a.jpg", tmp_path)
    assert b"script" not in kept.read_bytes()
    with Image.open(kept) as picture:
        assert (picture.format, picture.size) == ("PNG", (6, 4))
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
