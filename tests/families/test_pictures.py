"""Pictures are read upright and as RGB, as diffusers users read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers.utils import load_image
from PIL import Image

from dittocache.data.pictures import picture_size
from dittocache.errors import DataError
from dittocache.families.pictures import PictureRequest, open_picture, requested_size, resized_picture


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


def test_a_flipped_picture_is_mirrored_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((64, 32)).convert("RGB").save(path, exif=exif)
    upright = open_picture(path)
    flipped = resized_picture(PictureRequest(path, size=upright.size, flipped=True))
    assert flipped.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() == upright.tobytes() != flipped.tobytes()


@pytest.mark.parametrize("size", [(300, 100), (100, 300)], ids=["wide", "tall"])
def test_a_cropped_picture_is_cut_at_the_centre_and_not_stretched(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "picture.png"
    picture = Image.new("RGB", size, (255, 0, 0))
    left, top = (size[0] - 100) // 2, (size[1] - 100) // 2
    picture.paste((0, 0, 255), (left, top, left + 100, top + 100))
    picture.save(path)
    cut = resized_picture(PictureRequest(path, size=(64, 64), cropped=True))
    inner = cut.crop((4, 4, 60, 60))  # resampling blends the very edge
    assert inner.getcolors() == [(56 * 56, (0, 0, 255))]
    stretched = resized_picture(PictureRequest(path, size=(64, 64)))
    assert len(stretched.getcolors(10_000) or []) > 1


def test_without_a_size_a_picture_keeps_its_own_as_far_as_the_multiple_lets_it(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    for size, multiple, expected in (
        ((100, 70), 32, (96, 64)),
        ((100, 70), 16, (96, 64)),
        ((320, 64), 32, (320, 64)),
        ((3, 200), 32, (32, 192)),
    ):
        Image.new("RGB", size).save(path)
        request = PictureRequest(path, multiple=multiple)
        assert resized_picture(request).size == requested_size(request, picture_size) == expected
