"""Hugging Face data sets: every layout gives files, each picture is kept once and whole, nothing is read needlessly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from huggingface_hub import constants
from tests.data.listed_sets import entries_of, picture, picture_bytes, problems_of, read

from dittocache.data import digests
from dittocache.data.listed import arrow_source
from dittocache.data.listed.kinds import kind_of
from dittocache.data.listed.picture_store import PictureStore
from dittocache.errors import DataError

datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")

RED, BLUE, GREEN, WHITE = (picture_bytes(colour) for colour in ("red", "blue", "green", "white"))
JPEG = picture_bytes("red", "JPEG")
CONTENTS = [RED, BLUE, GREEN, WHITE, JPEG]


def dataset(rows: Sequence[dict[str, Any]], images: Sequence[str] = (), several: Sequence[str] = ()) -> Any:
    """Rows whose columns of pictures are given as bytes."""

    def cell(value: Any) -> Any:
        return {"bytes": value, "path": None} if isinstance(value, bytes) else value

    columns = {
        name: [[cell(one) for one in row[name]] if name in several else cell(row[name]) for row in rows]
        for name in rows[0]
    }
    picture, words = datasets.Image(), datasets.Value("string")
    kinds = {name: datasets.List(picture) if name in several else picture for name in (*images, *several)}
    features = datasets.Features({name: kinds.get(name, words) for name in rows[0]})
    return datasets.Dataset.from_dict(columns, features=features)


def qflux_set() -> Any:
    return dataset(
        [
            {"target_image": RED, "control_images": [BLUE, JPEG], "prompt": "one", "control_mask": WHITE},
            {"target_image": GREEN, "control_images": [BLUE], "prompt": "two", "control_mask": None},
        ],
        images=("target_image", "control_mask"),
        several=("control_images",),
    )


def check_qflux(path: Path, memory: Path, names: list[str]) -> None:
    entries = entries_of(path, memory=memory)
    assert [one.name for one in entries] == names
    assert [one.prompt for one in entries] == ["one", "two"]
    assert [one.target.read_bytes() for one in entries] == [RED, GREEN]
    assert [[file.read_bytes() for file in one.controls] for one in entries] == [[BLUE, JPEG], [BLUE]]
    assert entries[0].mask is not None and entries[0].mask.read_bytes() == WHITE and entries[1].mask is None
    kept = sorted(file.name for file in (memory / "hf").iterdir() if file.suffix in (".png", ".jpg"))
    expected = {blake3(content).hexdigest(length=16): "png" for content in (RED, GREEN, BLUE, WHITE)}
    expected[blake3(JPEG).hexdigest(length=16)] = "jpg"
    assert kept == sorted(f"{name}.{ending}" for name, ending in expected.items())


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    qflux_set().save_to_disk(tmp_path / "set")
    assert kind_of(tmp_path / "set") == "saved"
    check_qflux(tmp_path / "set", tmp_path / "memory", ["000000", "000001"])


def test_the_split_train_of_several(tmp_path: Path) -> None:
    other = qflux_set().select([0])
    datasets.DatasetDict(test=other, train=qflux_set()).save_to_disk(tmp_path / "set")
    check_qflux(tmp_path / "set", tmp_path / "memory", ["train/000000", "train/000001"])
    assert [one.prompt for one in entries_of(tmp_path / "set/test", memory=tmp_path)] == ["one"]
    datasets.DatasetDict(a=other, b=other).save_to_disk(tmp_path / "two")
    assert problems_of(tmp_path / "two") == ["two has the splits a, b, but no train; name the folder of one"]


def test_a_folder_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "set/data").mkdir(parents=True)
    for number in range(2):
        qflux_set().select([number]).to_parquet(tmp_path / f"set/data/train-0000{number}-of-00002.parquet")
    qflux_set().to_parquet(tmp_path / "set/data/test-00000-of-00001.parquet")
    (tmp_path / "set/README.md").write_text("about it")
    assert kind_of(tmp_path / "set") == "parquet"
    names = [f"data/train-0000{number}-of-00002/000000" for number in range(2)]
    check_qflux(tmp_path / "set", tmp_path / "memory", names)


@pytest.mark.parametrize("kind", ["saved", "parquet"])
@pytest.mark.parametrize(
    ("target", "control", "prompt"),
    [
        ("image", None, "text"),
        ("image", "conditioning_image", "text"),
        ("image", "control_image", "caption"),
        ("target_image", "source_image", "prompt"),
        ("edited_image", "original_image", "edit_prompt"),
        ("edited_image", "input_image", "edit_prompt"),
    ],
)
def test_columns_of_known_sets(tmp_path: Path, kind: str, target: str, control: str | None, prompt: str) -> None:
    row: dict[str, Any] = {target: RED, prompt: "paint it", "original_prompt": "a", "edited_prompt": "b"}
    if control is not None:
        row[control] = BLUE
    made = dataset([row], images=[name for name in (target, control) if name])
    path = tmp_path / ("set" if kind == "saved" else "set.parquet")
    made.save_to_disk(path) if kind == "saved" else made.to_parquet(path)
    [entry] = entries_of(path, memory=tmp_path)
    assert (entry.target.read_bytes(), entry.prompt) == (RED, "paint it")
    assert [file.read_bytes() for file in entry.controls] == ([BLUE] if control else [])


def test_plain_bytes_and_paths_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    target = picture(tmp_path / "set/a.png")
    table = pyarrow.table({"image": ["a.png", "a.png"], "control": [RED, BLUE], "text": ["one", "one"]})
    parquet.write_table(table, tmp_path / "set/rows.parquet")
    entries = entries_of(tmp_path / "set", memory=tmp_path)
    assert [(one.name, one.target) for one in entries] == [("rows/000000", target), ("rows/000001", target)]
    assert [one.controls[0].read_bytes() for one in entries] == [RED, BLUE]
    target.unlink()
    assert problems_of(tmp_path / "set", memory=tmp_path) == [
        f"set, rows, row {number}: picture 'a.png' does not exist in set" for number in range(2)
    ]


def test_the_setting_names_columns(tmp_path: Path) -> None:
    made = dataset([{"x": RED, "y": "paint it", "z": BLUE}], images=("x", "z"))
    made.to_parquet(tmp_path / "set.parquet")
    [entry] = entries_of(tmp_path / "set.parquet", {"target": "z", "prompt": "y", "controls": "x"}, tmp_path)
    assert (entry.target.read_bytes(), entry.controls[0].read_bytes()) == (BLUE, RED)


def test_problems_name_the_row(tmp_path: Path) -> None:
    rows = [
        {"image": RED, "text": "fine", "control": BLUE},
        {"image": b"no picture", "text": "x", "control": BLUE},
        {"image": RED, "text": " ", "control": BLUE},
        {"image": None, "text": "x", "control": BLUE},
        {"image": RED, "text": None, "control": BLUE},
        {"image": RED, "text": "x", "control": None},
        {"image": RED, "text": "fine", "control": BLUE},
    ]
    dataset(rows, images=("image", "control")).save_to_disk(tmp_path / "set")
    assert problems_of(tmp_path / "set", memory=tmp_path) == [
        "set, row 1: column 'image' holds 10 bytes that are no picture, or a damaged one",
        "set, row 2: the caption in column 'text' is empty",
        "set, row 3: no target picture in column 'image'",
        "set, row 4: no caption; expected it in column 'text'",
        "set, row 5: no control picture in 'control', but 2 other row(s) have one",
    ]


def test_damaged_sets(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"p/{name}.parquet").write_bytes(b"PAR1 no parquet")
    found = problems_of(tmp_path / "p")
    assert [one.partition(":")[0] for one in found] == ["p/a.parquet", "p/b.parquet"]
    qflux_set().save_to_disk(tmp_path / "s")
    (arrow,) = (tmp_path / "s").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    [problem] = problems_of(tmp_path / "s", memory=tmp_path)
    assert problem.startswith("s ")
    shutil.rmtree(tmp_path / "s")
    qflux_set().to_parquet(tmp_path / "t.parquet")
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[4:400] = bytes(396)
    (tmp_path / "t.parquet").write_bytes(content)
    assert problems_of(tmp_path / "t.parquet", memory=tmp_path)


def test_a_set_without_samples_or_captions(tmp_path: Path) -> None:
    qflux_set().select([]).to_parquet(tmp_path / "empty.parquet")
    assert problems_of(tmp_path / "empty.parquet", memory=tmp_path) == ["empty.parquet lists no samples"]
    dataset([{"image": RED}], images=("image",)).to_parquet(tmp_path / "words.parquet")
    assert problems_of(tmp_path / "words.parquet", memory=tmp_path) == [
        "words.parquet: no column of captions among 'image'; say which one it is with columns.prompt"
    ]


def test_files_with_other_columns_than_the_first(tmp_path: Path) -> None:
    dataset([{"image": RED, "text": "x"}], images=("image",)).to_parquet(tmp_path / "a.parquet")
    dataset([{"image": RED, "prompt": "x"}], images=("image",)).to_parquet(tmp_path / "b.parquet")
    [problem] = problems_of(tmp_path, memory=tmp_path)
    assert problem.endswith(": b has no column 'text', but a has one")


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_an_unchanged_set_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / ("set" if kind == "saved" else "set.parquet")
    qflux_set().save_to_disk(path) if kind == "saved" else qflux_set().to_parquet(path)
    monkeypatch.setattr("dittocache.data.listed.remembered.GRANULARITY_NS", 0)
    first = entries_of(path, memory=tmp_path)
    kept: list[bytes] = []
    keep = PictureStore.keep
    monkeypatch.setattr(PictureStore, "keep", lambda store, content: (kept.append(content), keep(store, content))[1])
    assert entries_of(path, memory=tmp_path) == first and kept == []

    first[1].target.write_bytes(GREEN[:20])  # torn
    assert entries_of(path, memory=tmp_path) == first and len(kept) == 6
    assert first[1].target.read_bytes() == GREEN
    first[0].target.unlink()
    assert entries_of(path, memory=tmp_path) == first and first[0].target.read_bytes() == RED

    kept.clear()
    (file,) = [path] if kind == "parquet" else path.glob("*.arrow")
    os.utime(file)
    assert entries_of(path, memory=tmp_path) == first and len(kept) == 6


def test_a_set_that_has_just_been_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.parquet"
    qflux_set().to_parquet(path)
    monkeypatch.setattr("dittocache.data.listed.remembered.GRANULARITY_NS", 3600 * 10**9)
    first = entries_of(path, memory=tmp_path)
    (rows,) = (tmp_path / "hf").glob("*.columns")
    monkeypatch.setattr(PictureStore, "keep", lambda *_: pytest.fail("read") if rows.exists() else "")
    with pytest.raises(pytest.fail.Exception, match="read"):
        entries_of(path, memory=tmp_path)
    assert len(first) == 2 and digests.GRANULARITY_NS > 0


def test_a_damaged_memory_is_started_afresh(tmp_path: Path) -> None:
    qflux_set().to_parquet(tmp_path / "set.parquet")
    first = entries_of(tmp_path / "set.parquet", memory=tmp_path)
    (rows,) = (tmp_path / "hf").glob("*.columns")
    rows.write_bytes(rows.read_bytes()[:-9])
    assert entries_of(tmp_path / "set.parquet", memory=tmp_path) == first


def test_a_changed_set_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dittocache.data.listed.remembered.GRANULARITY_NS", 0)
    made = dataset([{"image": RED, "text": "one"}], images=("image",))
    made.to_parquet(tmp_path / "set.parquet")
    assert entries_of(tmp_path / "set.parquet", memory=tmp_path)[0].prompt == "one"
    dataset([{"image": RED, "text": "two"}], images=("image",)).to_parquet(tmp_path / "set.parquet")
    assert entries_of(tmp_path / "set.parquet", memory=tmp_path)[0].prompt == "two"


def test_without_a_memory_pictures_are_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    qflux_set().to_parquet(tmp_path / "set.parquet")
    assert entries_of(tmp_path / "set.parquet")[0].target.parent == tmp_path / "cache/dittocache/hf"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file in the way")
    qflux_set().to_parquet(tmp_path / "set.parquet")
    [problem] = problems_of(tmp_path / "set.parquet", memory=tmp_path)
    assert "cannot be kept in" in problem and "cache_dir" in problem


def test_the_rows_of_all_batches_are_read(tmp_path: Path) -> None:
    rows = [{"image": RED, "text": str(number)} for number in range(3 * arrow_source.BATCH_ROWS + 1)]
    dataset(rows, images=("image",)).to_parquet(tmp_path / "set.parquet")
    dataset(rows, images=("image",)).save_to_disk(tmp_path / "set")
    for path in (tmp_path / "set.parquet", tmp_path / "set"):
        entries = entries_of(path, memory=tmp_path)
        assert [one.prompt for one in entries] == [row["text"] for row in rows]
        assert len({one.name for one in entries}) == len(rows)


@pytest.mark.parametrize("path", ["set.parquet", "set"])
def test_a_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    qflux_set().to_parquet(tmp_path / "set.parquet")
    qflux_set().save_to_disk(tmp_path / "set")
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    [problem] = problems_of(tmp_path / path)
    assert "pip install 'dittocache[datasets]'" in problem


def test_a_set_of_the_hub_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub/datasets--someone--pictures/snapshots/0123"
    (snapshot / "data").mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    qflux_set().to_parquet(snapshot / "data/train-00000-of-00001.parquet")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert kind_of(Path("someone/pictures")) == "hub"
    entries = entries_of(Path("someone/pictures"), memory=tmp_path)
    assert [one.prompt for one in entries] == ["one", "two"]
    [problem] = problems_of(Path("someone/else"))
    assert problem.endswith("or fetch it first: hf download --repo-type dataset else")


def test_a_set_that_datasets_has_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qflux_set().to_parquet(tmp_path / "set.parquet")
    made = datasets.load_dataset("parquet", data_files=str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "made"))
    (arrow,) = [Path(one["filename"]) for one in made["train"].cache_files]
    place = tmp_path / "cache/someone___pictures/default/0.0.0/0123"
    place.mkdir(parents=True)
    shutil.copy(arrow, place / "pictures-train.arrow")
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    info.update(dataset_name="pictures", config_name="default")
    (place / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    entries = entries_of(Path("someone/pictures"), memory=tmp_path)
    assert [(one.name, one.prompt) for one in entries] == [("train/000000", "one"), ("train/000001", "two")]
    assert entries[1].target.read_bytes() == GREEN


KEEP_MANY = """
import sys
from pathlib import Path
from dittocache.data.listed.picture_store import PictureStore

contents = [bytes.fromhex(line) for line in sys.argv[2:]]
store = PictureStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for content in contents * 5:
    assert (store.folder / store.keep(content)).read_bytes() == content
"""


def test_several_processes_keep_the_same_pictures(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KEEP_MANY, str(tmp_path), *(content.hex() for content in CONTENTS)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=60)
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == len(CONTENTS)  # nothing temporary is left


def test_what_is_kept(tmp_path: Path) -> None:
    store = PictureStore(tmp_path / "kept")
    with pytest.raises(DataError, match="no picture"):
        store.keep(b"")
    assert not store.folder.exists()
    file = store.folder / store.keep(picture_bytes("red", "WEBP"))
    assert file.suffix == ".webp"


def test_a_folder_whose_name_is_misspelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("datasets", "datasets.packaged_modules.cache.cache"):
        monkeypatch.setitem(sys.modules, name, None)
    [problem] = read(Path("data/pictuers"))[1]
    assert problem.startswith("data/pictuers is no file or folder")
