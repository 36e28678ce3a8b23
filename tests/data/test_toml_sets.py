"""Lists of data sets in TOML are read as musubi-tuner and kohya's scripts mean them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dittocache.data.config import DataConfig
from dittocache.data.loading import load_samples, notes_of
from dittocache.data.sample import Sample
from dittocache.errors import DataError

PLAIN = "[[datasets]]\nimage_directory = 'plain'\n"


def add(path: Path, size: tuple[int, int] = (64, 64), caption: str | None = None, ending: str = ".txt") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(ending).write_text(caption, encoding="utf-8")
    return path


def toml(folder: Path, text: str) -> Path:
    path = folder / "sets.toml"
    path.write_text(text)
    return path


def loaded(path: Path, **settings: Any) -> list[Sample]:
    return list(load_samples(DataConfig(path=path, **settings), 16, None))


def problems(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        loaded(path)
    return list(caught.value.problems) or [str(caught.value)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add(tmp_path / "targets/a.png", (192, 108), "paint it", ".caption")
    add(tmp_path / "controls/a.png", (96, 96))
    add(tmp_path / "plain/a.png", (64, 64), "a square")
    return tmp_path


def test_a_file_as_musubi_tuner_has_it(folder: Path) -> None:
    path = toml(
        folder,
        f"""
        [general]
        resolution = [192, 108]
        caption_extension = ".caption"
        enable_bucket = true
        bucket_no_upscale = false

        [[datasets]]
        image_directory = "{folder}/targets"
        control_directory = "{folder}/controls"
        control_resolution = [128, 32]
        num_repeats = 2

        [[datasets]]
        image_directory = "{folder}/plain"
        caption_extension = ".txt"
        resolution = 128
        bucket_no_upscale = true
        """,
    )
    first, second = loaded(path, caption_prefix="photo:", resolution=1024)
    assert first == Sample(
        "targets/a",
        folder / "targets/a.png",
        (folder / "controls/a.png",),
        "photo: paint it",
        (192, 112),
        control_resolution=64,
        repeats=2,
    )
    assert second == Sample("plain/a", folder / "plain/a.png", (), "photo: a square", (64, 64), control_resolution=128)


def test_without_buckets_pictures_are_cut_to_the_frame(folder: Path) -> None:
    text = '[[datasets]]\nimage_directory = "plain"\nresolution = [100, 64]\n{}'
    path = toml(folder, text.format("enable_bucket = false"))
    [sample] = found = load_samples(DataConfig(path=path), 16, None)
    assert (sample.size, sample.cropped) == ((96, 64), True)
    assert notes_of(found) == []
    [note] = notes_of(load_samples(DataConfig(path=toml(folder, text.format(""))), 16, None))
    assert "datasets 1: without enable_bucket = true every picture is cut to 100x64 pixels" in note


def test_settings_of_the_run_are_told_and_do_not_count(folder: Path) -> None:
    path = toml(
        folder,
        f'[general]\nbatch_size = 4\nenable_bucket = true\n{PLAIN}cache_directory = "c"',
    )
    found = notes_of(load_samples(DataConfig(path=path), 16, None))
    assert [note.partition("datasets 1: ")[2] for note in found] == [
        "batch_size = 4 does not count: batches have train.batch_size samples",
        "cache_directory = 'c' does not count: what is encoded is kept in cache.cache_dir",
    ]


def test_numbered_controls_belong_to_their_picture(folder: Path) -> None:
    add(folder / "targets/a_1.png", caption="other", ending=".caption")
    expected = [add(folder / f"controls/a_{number}.png") for number in (1, 0, 10, 2)]
    path = toml(
        folder,
        '[[datasets]]\nimage_directory = "targets"\ncontrol_directory = "controls"\ncaption_extension = "caption"',
    )
    first, second = loaded(path)
    names = [control.name for control in first.controls]
    assert (first.name, names) == ("a", ["a.png", "a_0.png", "a_2.png", "a_10.png"])
    assert (second.name, second.controls) == ("a_1", (expected[0],))


def test_sub_folders_belong_to_other_sets(folder: Path) -> None:
    add(folder / "plain/more/b.png", caption="b")
    text = "\n".join(f'[[datasets]]\nimage_directory = "{place}"' for place in ("plain", "plain/more"))
    assert [sample.name for sample in loaded(toml(folder, text))] == ["plain/a", "more/b"]


def test_subsets_are_sets_with_what_their_set_says(folder: Path) -> None:
    path = toml(
        folder,
        """
        [[datasets]]
        resolution = 64
        enable_bucket = true
        bucket_reso_steps = 32
        [[datasets.subsets]]
        image_dir = "plain"
        num_repeats = 3
        flip_aug = true
        [[datasets.subsets]]
        image_dir = "targets"
        conditioning_data_dir = "controls"
        caption_extension = ".caption"
        """,
    )
    found = [(sample.name, sample.repeats, sample.size) for sample in loaded(path)]
    assert found == [("plain/a", 3, (64, 64)), ("plain/a@flipped", 3, (64, 64)), ("targets/a", 1, (96, 64))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[datasets]\n", "is not valid TOML: Expected ']]' at the end of an array declaration (at line 1"),
        ("", "there is no data set; expected at least one table [[datasets]]"),
        ("general = 1\n[[datasets]]\nimage_directory = 'plain'", "general is 1; expected a table"),
        (
            "[[dataset]]\n[[datasets]]\nimage_directory = 'plain'",
            "dataset: there is no such setting; did you mean data",
        ),
        ("[general]\nresolutoin = 2\n[[datasets]]\nimage_directory = 'plain'", "general: resolutoin: there is no such"),
        ("[[datasets]]\nnum_repeats = 2", "neither image_directory nor image_jsonl_file"),
        (f"{PLAIN}num_repeat = 2", "num_repeat: there is no such setting; did you mean num_repeats?"),
        (f"{PLAIN}image_jsonl_file = 'x'", "are both there"),
        ("[[datasets]]\nimage_jsonl_file = 'x'\ncontrol_directory = 'plain'", "names its own controls"),
        ("[[datasets]]\nvideo_directory = 'plain'", "videos cannot be trained on"),
        ("[[datasets]]\nimage_directory = 3", "image_directory: found 3; expected a path"),
        (f"{PLAIN}resolution = [1, 2, 3]", "resolution: found [1, 2, 3]; expected a side"),
        (f"{PLAIN}num_repeats = 0", "num_repeats: found 0; expected greater than or equal to 1"),
        (f"{PLAIN}enable_bucket = 3", "enable_bucket: found 3; expected"),
        (f"{PLAIN}subsets = 1", "subsets is 1; expected tables [[datasets.subsets]]"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(folder: Path, text: str, words: str) -> None:
    [problem] = problems(toml(folder, text))
    assert str(folder / "sets.toml") in problem and words in problem


def test_all_problems_of_all_sets_are_listed_at_once(folder: Path) -> None:
    (folder / "plain/a.txt").unlink()
    (folder / "controls/a.png").write_bytes(b"damaged")
    (folder / "empty").mkdir()
    path = toml(
        folder,
        """
        [[datasets]]
        image_directory = "plain"
        [[datasets]]
        image_directory = "targets"
        caption_extension = ".caption"
        control_directory = "controls"
        [[datasets]]
        image_directory = "empty"
        [[datasets]]
        image_directory = "nowhere"
        [[datasets]]
        image_directory = "plain"
        bucket_step = 24
        [[datasets]]
        image_directory = "plain"
        resolution = 1
        """,
    )
    found = problems(path)
    for words in (
        "datasets 6: resolution: found 1",
        "plain/a.png: no caption",
        "controls/a.png cannot be read",
        "empty holds no picture",
        "nowhere is not a folder",
        "found bucket_step 24; this model needs a multiple of 16",
    ):
        assert [problem for problem in found if words in problem], (words, found)
    assert len(found) == 6


def test_folders_are_found_from_the_working_directory_first(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toml(folder, '[[datasets]]\nimage_directory = "plain"')
    assert loaded(path)[0].target == folder / "plain/a.png"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    add(elsewhere / "plain/b.png", caption="b")
    monkeypatch.chdir(elsewhere)
    assert [sample.name for sample in loaded(path)] == ["b"]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert "there is no file" in problems(tmp_path / "no.toml")[0]
