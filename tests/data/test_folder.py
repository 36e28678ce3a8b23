"""Folders: every layout is read, every problem is named, and all of them at once."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from dittocache.data.config import SetConfig
from dittocache.data.folder import CONTROL_FOLDERS, TARGET_FOLDERS, load_folder
from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.errors import DataError


def add(path: Path, size: tuple[int, int] = (8, 8), caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def loaded(folder: Path, resolution: int = 64) -> list[Sample]:
    return load_folder(SetConfig(path=folder, resolution=resolution), 32)


def problems(folder: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        loaded(folder)
    return list(caught.value.problems) or [str(caught.value)]


@pytest.mark.parametrize("targets", TARGET_FOLDERS)
@pytest.mark.parametrize("controls", CONTROL_FOLDERS)
def test_every_layout_is_read(tmp_path: Path, targets: str, controls: str) -> None:
    target = add(tmp_path / targets / "a.png", caption="  paint it red \n")
    control = add(tmp_path / controls / "a.jpg")
    assert loaded(tmp_path) == [Sample("a", target, (control,), "paint it red", (64, 64))]


def test_further_controls_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    add(tmp_path / "images/a.png", caption="a")
    names = ["a.png", "a_control_1.png", "a_control_2.webp", "a_control_10.png"]
    expected = tuple(add(tmp_path / "control" / name) for name in names)
    add(tmp_path / "control/a_control_x.png")
    assert loaded(tmp_path)[0].controls == expected


def test_numbered_controls_alone_are_enough(tmp_path: Path) -> None:
    add(tmp_path / "images/a.png", caption="a")
    expected = (add(tmp_path / "control/a_control_0.png"), add(tmp_path / "control/a_control_1.png"))
    assert loaded(tmp_path)[0].controls == expected


@pytest.mark.parametrize("folder", ["images", "control"])
def test_a_mask_stands_beside_the_target_or_the_control(tmp_path: Path, folder: str) -> None:
    add(tmp_path / "images/a.png", caption="a")
    add(tmp_path / "control/a.png")
    mask = add(tmp_path / folder / "a_mask.png")
    [sample] = loaded(tmp_path)
    assert sample.mask == mask and len(sample.controls) == 1


def test_a_picture_with_its_own_caption_is_a_sample_whatever_its_name(tmp_path: Path) -> None:
    add(tmp_path / "images/gas.png", caption="gas")
    add(tmp_path / "images/gas_mask.png", caption="a gas mask")
    assert [(sample.name, sample.mask is not None) for sample in loaded(tmp_path)] == [
        ("gas", True),
        ("gas_mask", False),
    ]


def test_without_a_control_folder_it_is_text_to_image(tmp_path: Path) -> None:
    add(tmp_path / "images/a.png", caption="a")
    assert loaded(tmp_path)[0].controls == ()


def test_sub_folders_are_part_of_the_name(tmp_path: Path) -> None:
    for name in ("one/a", "two/a"):
        add(tmp_path / f"images/{name}.png", caption=name)
        add(tmp_path / f"control/{name}.png")
    assert [sample.name for sample in loaded(tmp_path)] == ["one/a", "two/a"]


def test_hidden_files_are_no_part_of_the_set(tmp_path: Path) -> None:
    add(tmp_path / "images/a.png", caption="a")
    (tmp_path / "images/._a.png").write_bytes(b"macOS wrote this")
    (tmp_path / "images/.thumbnails").mkdir()
    add(tmp_path / "images/.thumbnails/a.png")
    (tmp_path / "images/Thumbs.db").write_bytes(b"Windows wrote this")
    assert [sample.name for sample in loaded(tmp_path)] == ["a"]


def test_names_in_any_script_and_either_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = "\u00e9t\u00e9 写真 🎨", "e\u0301te\u0301 写真 🎨"
    add(tmp_path / f"images/{composed}.png")
    (tmp_path / f"images/{decomposed}.txt").write_text("空を青く塗る", encoding="utf-8")
    control = add(tmp_path / f"control/{decomposed}.png")
    [sample] = loaded(tmp_path)
    assert (sample.name, sample.prompt, sample.controls) == (composed, "空を青く塗る", (control,))


def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path: Path) -> None:
    add(tmp_path / "images/a.png").with_suffix(".txt").write_bytes(b"\xef\xbb\xbfpaint it\r\n")
    assert loaded(tmp_path)[0].prompt == "paint it"


def test_every_problem_of_a_set_is_listed_with_its_file(tmp_path: Path) -> None:
    for name in ("fine", "no-caption", "empty-caption", "no-control", "bad-control", "bad-target", "latin"):
        add(tmp_path / f"images/{name}.png", caption=name)
        add(tmp_path / f"control/{name}.png")
    (tmp_path / "images/no-caption.txt").unlink()
    (tmp_path / "images/empty-caption.txt").write_text(" \n")
    (tmp_path / "images/latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "control/no-control.png").unlink()
    (tmp_path / "control/bad-control.png").write_bytes(b"not a picture")
    (tmp_path / "images/bad-target.png").write_bytes(b"")
    add(tmp_path / "images/fine.jpg")
    found = problems(tmp_path)
    expected = {
        "no-caption.png": "no caption; expected it in no-caption.txt beside it",
        "empty-caption.txt": "the caption is empty",
        "latin.txt": "cannot be read as UTF-8",
        "no-control.png": "no control picture no-control.*",
        "bad-control.png": "cannot be read",
        "bad-target.png": "cannot be read",
        "fine.png": "fine.jpg has the same name",
    }
    assert len(found) == len(expected)
    for file, words in expected.items():
        assert [problem for problem in found if file in problem and words in problem], (file, found)


def test_a_set_without_samples_says_what_was_expected(tmp_path: Path) -> None:
    assert "is not a folder; set data.path" in problems(tmp_path / "nowhere")[0]
    assert "no folder of target pictures; expected one of training_images, images" in problems(tmp_path)[0]
    (tmp_path / "images").mkdir()
    assert "holds no picture" in problems(tmp_path)[0]
    (tmp_path / "targets").mkdir()
    assert problems(tmp_path) == ["images and targets both exist; keep one of them"]


def test_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    add(tmp_path / "images/a.png", caption="a")
    undecodable = os.fsdecode(os.fsencode(tmp_path) + b"/images/b\xff.png")
    try:
        Path(undecodable).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    assert ["not valid Unicode" in problem for problem in problems(tmp_path)] == [True]


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    add(tmp_path / "images/a.png", caption="a")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "images/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    [problem] = problems(tmp_path)
    assert "a.png cannot be read" in problem and "decompression bomb" in problem


def test_the_size_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=turned)
    assert picture_size(tmp_path / "a.jpg") == (20, 40)
    with pytest.raises(DataError, match=r"b\.jpg does not exist"):
        picture_size(tmp_path / "b.jpg")


def test_samples_get_the_bucket_of_their_aspect_ratio(tmp_path: Path) -> None:
    add(tmp_path / "images/a.png", size=(400, 200), caption="a")
    assert loaded(tmp_path, resolution=1024)[0].size == (1440, 736)
