"""Pictures are read upright and as RGB, as diffusers users read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers.utils import load_image
from PIL import Image

from dittocache.data.pictures import picture_size
from dittocache.errors import DataError
from dittocache.families.pictures import open_picture


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_stands_upright_with_the_size_that_planning_counts_on(
    tmp_path: Path, orientation: int
) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.linear_gradient("L").resize((40, 20)).convert("RGB")
    picture.save(path, exif=exif)
    opened = open_picture(path)
    assert opened.size == picture_size(path) == ((40, 20) if orientation < 5 else (20, 40))
    assert opened.tobytes() == load_image(str(path)).tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (8, 6)).save(path)
    assert open_picture(path).mode == "RGB"


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "words.png"
    path.write_text("not a picture")
    with pytest.raises(DataError, match=r"words\.png cannot be read"):
        open_picture(path)
    with pytest.raises(DataError, match=r"absent\.png does not exist"):
        open_picture(tmp_path / "absent.png")


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"cut\.png cannot be read"):
        open_picture(path)
