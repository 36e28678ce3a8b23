"""JSON lines and lists: musubi-tuner's and diffusers' keys, several controls in a list, every damage with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.data.listed_sets import entries_of, picture, problems_of, read

from dittocache.data.listed.entry import Entry


def lines(folder: Path, *rows: object, name: str = "list.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def test_musubi_keys(tmp_path: Path) -> None:
    target = picture(tmp_path / "a.png")
    controls = [picture(tmp_path / f"c{number}.png") for number in range(3)]
    numbered = {f"control_path_{number}": f"c{number}.png" for number in (2, 0, 1)}
    file = lines(tmp_path, {"image_path": str(target), "caption": "red", **numbered})
    assert entries_of(file) == [Entry("a", target, tuple(controls), "red")]
    file = lines(tmp_path, {"image_path": "a.png", "control_path": "c1.png", "caption": "red"})
    assert entries_of(file) == [Entry("a", target, (controls[1],), "red")]


@pytest.mark.parametrize("name", ["list.jsonl", "list.ndjson", "list.json"])
def test_diffusers_keys_with_controls_in_a_list(tmp_path: Path, name: str) -> None:
    target, mask = picture(tmp_path / "a.png"), picture(tmp_path / "m.png")
    controls = tuple(picture(tmp_path / f"c{number}.png") for number in range(2))
    row = {"file_name": "a.png", "text": "red", "control_images": ["c0.png", "c1.png"], "mask": "m.png", "width": 4}
    file = tmp_path / name
    file.write_text(json.dumps([row]) if name.endswith(".json") else f"\ufeff{json.dumps(row)}\n\n", encoding="utf-8")
    assert entries_of(file) == [Entry("a", target, controls, "red", mask)]


def test_rows_need_not_have_all_keys(tmp_path: Path) -> None:
    for name in "abcm":
        picture(tmp_path / f"{name}.png")
    file = lines(
        tmp_path,
        {"image": "a.png", "text": "1", "control_0": "c.png"},
        {"image": "b.png", "text": "2", "control_0": "c.png", "control_1": "a.png", "mask": "m.png"},
        {"image": "c.png", "text": "3", "control_0": None, "control_1": "a.png"},
    )
    assert [(len(one.controls), one.mask is not None) for one in entries_of(file)] == [
        (1, False),
        (2, True),
        (1, False),
    ]


def test_line_separators_inside_captions_are_no_line_ends(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    file = tmp_path / "list.jsonl"
    row = json.dumps({"image": "a.png", "text": "one\u2028two\x85three"}, ensure_ascii=False)
    file.write_bytes(f"{row}\r\n".encode())
    assert entries_of(file)[0].prompt == "one\u2028two\x85three"


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    file = lines(
        tmp_path,
        {"image": "a.png", "text": "fine", "control": ["b.png"]},
        '{"image": "a.png", "text": }',
        ["a.png"],
        {"image": "a.png", "control": ["b.png"]},
        {"image": ["a.png", "b.png"], "text": "x", "control": "b.png"},
        {"image": 7, "text": "x", "control": "b.png"},
        {"image": "b.png", "text": ["x", "y"], "control": "b.png"},
        {"image": "c.png", "text": "x", "control": []},
        '{"image": "c.png", "text": "half \\ud83d", "control": "b.png"}',
        '{"image": "c\\u0000.png", "text": "x", "control": "b.png"}',
        "[" * 100_000,
    )
    assert problems_of(file) == [
        "list.jsonl, line 2: no JSON (column 28: Expecting value)",
        'list.jsonl, line 3: a list; expected an object such as {"file_name": ...}',
        "list.jsonl, line 11: no JSON (nested too deeply)",
        "list.jsonl, line 4: no caption; expected it in column 'text'",
        "list.jsonl, line 5: 2 pictures in column 'image'; expected one",
        "list.jsonl, line 6: column 'image' holds 7; expected the name of a picture file",
        "list.jsonl, line 7: the caption in column 'text' is ['x', 'y']; expected a text",
        "list.jsonl, line 9: the caption in column 'text' holds \\ud83d, half of a surrogate pair; correct it",
        "list.jsonl, line 10: the name of the picture in column 'image' holds a NUL byte; correct it",
        "list.jsonl, line 8: no control picture in 'control', but 1 other row(s) have one",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "list.json: no JSON (line 1, column 1: Expecting value)"),
        ("[]", "list.json lists no samples"),
        ('{"a.png": "red"}', "list.json holds an object; expected a list of objects, one for each sample"),
        ("[1]", 'list.json, entry 1: a number; expected an object such as {"file_name": ...}'),
        ('[\n{"image": 1,}]', "list.json: no JSON (line 2, column "),
    ],
)
def test_json_files_that_cannot_be_used(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "list.json").write_text(content)
    [found] = problems_of(tmp_path / "list.json")
    assert found.startswith(problem)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_of_pictures_with_metadata(tmp_path: Path, name: str, below: str) -> None:
    folder = tmp_path / below
    target, control = picture(folder / "x/a.png"), picture(folder / "x/b.png")
    row = {"file_name": "x/a.png", "source_file_name": "x/b.png", "text": "red"}
    text = json.dumps(row) if name.endswith("jsonl") else f"{','.join(row)}\n{','.join(row.values())}\n"
    (folder / name).write_text(text)
    assert entries_of(tmp_path) == [Entry("x/a", target, (control,), "red")]


def test_a_plain_folder_is_not_a_list(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    entries, problems = read(tmp_path)
    assert entries == [] and len(problems) == 1 and "is no list of samples" in problems[0]


def test_paths_may_start_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "pictures").mkdir()
    target = picture(tmp_path / "pictures" / "a.png")
    file = lines(tmp_path / "lists", {"image_path": "pictures/a.png", "caption": "red"})
    assert problems_of(file)
    monkeypatch.chdir(tmp_path)
    assert [entry.target for entry in entries_of(file)] == [target]
