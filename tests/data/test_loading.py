"""Whatever form data sets have, their samples come out alike; several sets keep their names apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dittocache.data.config import DataConfig
from dittocache.data.file_samples import FileSamples
from dittocache.data.loading import load_samples, notes_of
from dittocache.data.sample_sets import SampleSets, set_names
from dittocache.errors import DataError


def add(path: Path, caption: str | None = None, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def make_set(folder: Path, names: str = "ab", controls: bool = False) -> Path:
    for name in names:
        add(folder / f"training_images/{name}.png", f"caption {name}")
        if controls:
            add(folder / f"control_images/{name}.png")
    return folder


def loaded(memory: Path | None = None, **settings: Any) -> FileSamples | SampleSets:
    return load_samples(DataConfig(**{"path": None, "resolution": 64, **settings}), 16, memory)


def problems(**settings: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        loaded(**settings)
    return list(caught.value.problems) or [str(caught.value)]


def test_a_table_gives_the_samples_of_the_folder_that_it_lists(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", controls=True)
    add(folder / "control_images/a_mask.png")
    rows = [
        {
            "path_target": f"training_images/{name}.png",
            "path_control": f"control_images/{name}.png",
            "prompt": f"caption {name}",
            **({"path_mask": "control_images/a_mask.png"} if name == "a" else {}),
        }
        for name in "ab"
    ]
    table = folder / "set.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    settings: dict[str, Any] = {"resolution": [64, 96], "flip": True, "caption_prefix": "photo:", "repeats": 2}
    from_folder, from_table = list(loaded(path=folder, **settings)), list(loaded(path=table, **settings))
    assert len(from_folder) == 8

    def without_names(samples: list[Any]) -> list[dict[str, Any]]:
        return [{name: value for name, value in vars(sample).items() if name != "name"} for sample in samples]

    assert without_names(from_table) == without_names(from_folder)
    assert [sample.name.removeprefix("training_images/") for sample in from_table] == [one.name for one in from_folder]


def test_a_table_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_set(tmp_path / "set")
    table = folder / "set.csv"
    table.write_text("path_target,prompt\ntraining_images/a.png,one\ntraining_images/b.png,two\n")
    monkeypatch.setattr("dittocache.data.digests.GRANULARITY_NS", -(10**10))
    before = list(loaded(tmp_path / "memory", path=table))

    def unexpected(path: Path) -> tuple[int, int]:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("dittocache.data.file_table.picture_size", unexpected)
    assert list(loaded(tmp_path / "memory", path=table)) == before
    with pytest.raises(AssertionError, match="read again"):
        loaded(None, path=table)


def test_problems_of_a_table_and_of_its_pictures_are_listed_together(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", "abc")
    (folder / "training_images/b.png").write_bytes(b"damaged")
    table = folder / "set.csv"
    table.write_text("path_target,prompt\ntraining_images/a.png,one\ntraining_images/b.png,two\nno.png,three\n")
    found = problems(path=table)
    assert len(found) == 2
    assert "no.png" in found[0] and "b.png cannot be read" in found[1]


def test_a_folder_of_targets_is_a_folder_whatever_lies_beside_them(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    (folder / "metadata.csv").write_text("something,else\n")
    assert [sample.name for sample in loaded(path=folder)] == ["a", "b"]


def test_several_sets_keep_their_own_settings_and_names(tmp_path: Path) -> None:
    first, second = make_set(tmp_path / "one/cats"), make_set(tmp_path / "two/cats", "a")
    samples = loaded(
        repeats=2, sets=[{"path": first}, {"path": second, "resolution": 96, "repeats": 5}, {"path": second}]
    )
    assert [(one.name, one.size, one.repeats, one.control_resolution) for one in samples] == [
        ("one/cats/a", (64, 64), 2, None),
        ("one/cats/b", (64, 64), 2, None),
        ("two/cats/a", (96, 96), 5, 96),
        ("two/cats-2/a", (64, 64), 2, None),
    ]
    assert isinstance(samples, SampleSets) and len(samples) == 4
    assert samples[-1] == samples[3] and samples[1:3] == list(samples)[1:3]
    with pytest.raises(IndexError, match="there are 4 samples"):
        samples[4]


def test_set_names_take_as_much_of_their_path_as_tells_them_apart(tmp_path: Path) -> None:
    table = tmp_path / "c/cats.csv"
    table.parent.mkdir()
    table.write_text("")
    paths = [tmp_path / "a/images", tmp_path / "b/images", tmp_path / "dogs", table, tmp_path / "dogs", table]
    assert set_names(paths) == ["a/images", "b/images", "dogs", "cats", "dogs-2", "cats-2"]
    assert set_names([tmp_path / "a", tmp_path / "a/a"]) == [f"{tmp_path.name}/a", "a/a"]


def test_problems_of_all_sets_are_listed_at_once(tmp_path: Path) -> None:
    first, second = make_set(tmp_path / "one"), make_set(tmp_path / "two", controls=True)
    (first / "training_images/a.txt").unlink()
    (second / "control_images/b.png").unlink()
    found = problems(sets=[{"path": first}, {"path": second}, {"path": tmp_path / "three.jsonl"}])
    assert len(found) == 3
    for words in ("one/training_images/a.png: no caption", "no control picture b.*", "three.jsonl"):
        assert [problem for problem in found if words in problem], (words, found)


def test_a_file_that_is_called_as_a_variant_of_another_is_named(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", ["a", "a@flipped"])  # type: ignore[arg-type]
    assert len(loaded(path=folder)) == 2
    assert problems(path=folder, flip=True) == [
        "several samples are called 'a@flipped'; rename the files of all but one"
    ]


def test_a_step_that_the_model_cannot_take_is_named(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    assert loaded(path=folder, bucket_step=32)[0].size == (64, 64)
    assert problems(path=folder, bucket_step=24) == ["found bucket_step 24; this model needs a multiple of 16"]


def test_what_does_not_count_for_a_folder_is_told(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    [note] = notes_of(loaded(path=folder, columns={"prompt": "text"}))
    assert "is a folder and has no columns" in note
    table = folder / "set.csv"
    table.write_text("path_target,prompt\ntraining_images/a.png,one\n")
    assert "control_path is for folders" in problems(path=table, control_path=folder)[0]
