"""CSV: the columns that trainers write are known, captions are kept as they are, every damage has its line."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from tests.data.listed_sets import entries_of, picture, problems_of, read

from dittocache.data.listed.entry import Entry


def table(folder: Path, text: str, name: str = "list.csv") -> Path:
    file = folder / name
    file.write_bytes(text.encode("utf-8"))
    return file


def test_qflux_columns_in_the_order_of_the_controls_numbers(tmp_path: Path) -> None:
    target, mask = picture(tmp_path / "out/a.png"), picture(tmp_path / "a_mask.png")
    controls = [picture(tmp_path / f"in/a{number}.png") for number in (0, 1, 2, 10)]
    file = table(
        tmp_path,
        "path_target,path_control_10,path_control_2,path_control,path_control_1,prompt,path_mask\n"
        "out/a.png,in/a10.png,in/a2.png,in/a0.png,in/a1.png,paint it red,a_mask.png\n",
    )
    assert entries_of(file) == [Entry("out/a", target, tuple(controls), "paint it red", mask)]


@pytest.mark.parametrize("target", ["image", "file_name", "target", "image_path", "Target Image", "filename", "path"])
@pytest.mark.parametrize("prompt", ["text", "caption", "prompt", "edit_prompt", "Instruction"])
@pytest.mark.parametrize("control", ["control", "control_image", "source", "conditioning_image_file_name"])
def test_columns_of_other_trainers(tmp_path: Path, target: str, prompt: str, control: str) -> None:
    expected = Entry("a", picture(tmp_path / "a.png"), (picture(tmp_path / "b.png"),), "red")
    file = table(tmp_path, f"id,{prompt},{control},{target},score\n7,red,b.png,a.png,0.5\n")
    assert entries_of(file) == [expected]


def test_the_setting_overrides_the_guess(tmp_path: Path) -> None:
    for name in "tabmx":
        picture(tmp_path / f"{name}.png")
    file = table(tmp_path, "image,my_col,b_col,a_col,my_text,text,m\nx.png,t.png,b.png,a.png,mine,other,m.png\n")
    columns: dict[str, str | list[str]] = {"target": "my_col", "prompt": "my_text", "controls": ["a_col", "b_col"]}
    [entry] = entries_of(file, {**columns, "mask": "m"})
    assert entry.target.name == "t.png" and [one.name for one in entry.controls] == ["a.png", "b.png"]
    assert entry.prompt == "mine" and entry.mask is not None and entry.mask.name == "m.png"


def test_an_empty_list_says_that_there_is_none(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    file = table(tmp_path, "image,text,source\na.png,red,flickr\n")
    assert entries_of(file, {"controls": []})[0].controls == ()
    assert problems_of(file) == [f"list.csv, line 2: picture 'flickr' does not exist in {tmp_path}"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\r\n"])
def test_delimiters_are_told_from_the_line_of_names(tmp_path: Path, delimiter: str, start: str) -> None:
    picture(tmp_path / "a.png")
    head = delimiter.join(["file_name", "text"])
    file = table(tmp_path, f'{start}{head}\r\na.png{delimiter}"one, two; three\tfour"\r\n')
    assert entries_of(file)[0].prompt == "one, two; three\tfour"


@pytest.mark.parametrize("prompt", ['say "no", then\nleave', "first line\r\nsecond", "空を\u2028青く 🎨", "'", "a  b"])
def test_captions_are_kept_as_they_are(tmp_path: Path, prompt: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    with (tmp_path / "list.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["file_name", "text"], ["a.png", prompt], ["b.png", "x"]])
    assert [one.prompt for one in entries_of(tmp_path / "list.csv")] == [prompt.replace("\r\n", "\n"), "x"]


def test_captions_beside_the_targets_where_no_column_holds_them(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes("\ufeff été \n".encode())
    (tmp_path / "b.txt").write_text(" ")
    file = table(tmp_path, "image\na.png\nb.png\nc.png\n")
    entries, problems = read(file)
    assert [one.prompt for one in entries] == ["été"]
    assert problems == [
        f"{file}, line 3: the caption {tmp_path / 'b.txt'} is empty",
        f"{file}, line 4: no caption; expected it in a column 'prompt', or in {tmp_path / 'c.txt'}",
    ]
    (tmp_path / "c.caption").write_text("c")
    assert read(table(tmp_path, "image\nc.png\n"), caption_extension=".caption")[0][0].prompt == "c"


def test_names_are_paths_below_the_table_without_endings(tmp_path: Path) -> None:
    inside, outside = picture(tmp_path / "set/one/a.png"), picture(tmp_path / "other/a.png")
    file = table(tmp_path / "set", f"image,text\n{inside},1\n../other/a.png,2\n./one/../one/a.png,3\n")
    assert [one.name for one in entries_of(file)] == ["one/a", "other/a", "one/a#2"]
    assert entries_of(file)[1].target.samefile(outside)


def test_names_differ_where_targets_or_rows_do(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a#2.png"):
        picture(tmp_path / name)
    file = table(tmp_path, "image,text\na.png,1\na.jpg,1\na.png,2\na#2.png,1\na.jpg,2\n")
    assert [one.name for one in entries_of(file)] == ["a", "a.jpg", "a#2", "a#2_", "a.jpg#2"]


def test_names_in_either_unicode_form_and_from_windows(tmp_path: Path) -> None:
    composed, decomposed = "\u00e9t\u00e9 写真 🎨", "e\u0301te\u0301 写真 🎨"
    files = picture(tmp_path / f"x/{decomposed}.png"), picture(tmp_path / "x/b.png")
    file = table(tmp_path, f"image,text\nx/{composed}.png,1\nx\\b.png,2\n")
    assert [(one.name, one.target) for one in entries_of(file)] == [(f"x/{composed}", files[0]), ("x/b", files[1])]


def test_a_relative_path_of_the_table_gives_the_same_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "set/a.png")
    file = table(tmp_path / "set", f"image,text\na.png,1\n{tmp_path}/set/a.png,2\n")
    expected = [one.name for one in entries_of(file)]
    monkeypatch.chdir(tmp_path)
    assert [one.name for one in entries_of(Path("set/list.csv"))] == expected == ["a", "a#2"]


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "folder.png").mkdir()
    file = table(
        tmp_path,
        "file_name,control,text,mask\n"
        "a.png,b.png,fine,\n"
        "gone.png,b.png,x,\n"
        "\n"
        ",b.png,x,\n"
        'a.png,b.png,"  \n ",\n'
        "a.png,,no control,\n"
        "a.png,b.png,one, two, three\n"
        "a.png,gone.png,x,gone_mask.png\n"
        "folder.png,b.png,x,\n"
        "https://example.org/a.png,b.png,x,\n"
        "a.png,b.png,fine,\n"
        "c.png\n",
    )
    assert problems_of(file) == [
        "list.csv, line 9: 5 fields, but there are 4 columns; put quotes around a caption that holds the delimiter",
        f"list.csv, line 3: picture 'gone.png' does not exist in {tmp_path}",
        "list.csv, line 5: no target picture in column 'file_name'",
        "list.csv, line 6: the caption in column 'text' is empty",
        f"list.csv, line 10: picture 'gone.png' does not exist in {tmp_path}",
        f"list.csv, line 10: picture 'gone_mask.png' does not exist in {tmp_path}",
        f"list.csv, line 11: picture 'folder.png' does not exist in {tmp_path}",
        "list.csv, line 12: picture 'https://example.org/a.png' does not exist; it is a web address: download the "
        "pictures and name the files",
        "list.csv, line 13: the same as line 2; remove one of them (repeats trains on a set's samples more often)",
        "list.csv, line 14: no caption; expected it in column 'text'",
        "list.csv, line 8: no control picture in 'control', but 1 other row(s) have one",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "list.csv is empty; expected a line of column names, such as 'target,prompt'"),
        (b"\n \n", "list.csv is empty; expected a line of column names, such as 'target,prompt'"),
        (b",,\nimage,text\n", "list.csv, line 1: no column names; expected a line such as 'target,prompt'"),
        (b"image,text\n", "list.csv lists no samples"),
        (b"image,text\na.png,\xe9t\xe9\n", "list.csv, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (b"\xff\xfei\0m\0", "list.csv is in UTF-16; save it as UTF-8"),
        (
            b"image,text\na\0.png,x\n",
            "list.csv, line 2: a NUL byte; the file is damaged, or no text: save it again as UTF-8",
        ),
        (b"image,text,image\n", "list.csv, line 1: column 'image' is there twice; rename one of them"),
        (
            b'image,text\na.png,"never ends\nb.png,x\n',
            "list.csv, line 2: damaged (unexpected end of data); check its quotes: a quote inside is written twice",
        ),
        (
            b"image,caption,text\na.png,x,y\n",
            "list.csv, line 1: 'caption' and 'text' could each be the prompt; say which one with columns.prompt",
        ),
        (
            b"a.png,paint it red\nb.png,x\n",
            "list.csv, line 1: no column of target pictures among 'a.png', 'paint it red'; call it 'target' or "
            "'file_name', or say which one it is with columns.target",
        ),
        (
            b"image,promt\na.png,x\n",
            "list.csv, line 1: column 'promt' is not known; did you mean 'prompt'? Rename it, or say what holds the "
            "prompt with columns.prompt ([] for none)",
        ),
        (
            b"image,contrl_image,text\na.png,x,x\n",
            "list.csv, line 1: column 'contrl_image' is not known; did you mean 'control_image'? Rename it, or say "
            "what holds the controls with columns.controls ([] for none)",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: bytes, problem: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "list.csv").write_bytes(content)
    assert problem in problems_of(tmp_path / "list.csv")


def test_a_column_that_the_setting_misspells(tmp_path: Path) -> None:
    file = table(tmp_path, "picture_url,words\na.png,x\n")
    assert problems_of(file, {"target": "picture_ulr", "prompt": ["words", "more"]}) == [
        "list.csv, line 1: no column 'picture_ulr', which columns.target names (did you mean 'picture_url'?); there "
        "are 'picture_url', 'words'",
        "list.csv, line 1: columns.prompt names 2 columns; expected one",
        "list.csv, line 1: no column 'more', which columns.prompt names; there are 'picture_url', 'words'",
    ]


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "list.csv") == [
        "list.csv cannot be read: No such file or directory; set data.path to the list of the samples"
    ]


def test_folders_are_listed_once_and_files_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        picture(tmp_path / f"t/{number}.png")
    rows = "".join(f"t/{number}.png,{number}\n" for number in range(50))
    file = table(tmp_path, f"image,text\n{rows}")
    listed: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(os.fspath(path)), scan(path))[1])
    monkeypatch.setattr(os.path, "isfile", lambda _: pytest.fail("a file that is there was looked at"))
    assert len(entries_of(file)) == 50
    assert [Path(one) for one in listed] == [tmp_path / "t"]
