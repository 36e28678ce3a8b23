"""Whatever bytes a list holds: entries or problems, never an exception, and never neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.listed_sets import picture, read

from dittocache.data.listed.entry import Names

WORDS = st.sampled_from(
    ["image", "text", "control", "control_1", "mask", "a.png", "b.png", "", '"', "\\", "\0", "\ud800"]
)
CELLS = st.one_of(WORDS, st.text(max_size=8), st.none(), st.integers(), st.lists(WORDS, max_size=3))
TEXTS = st.lists(st.lists(st.one_of(WORDS, st.text(max_size=5)), max_size=5), max_size=6).flatmap(
    lambda rows: st.sampled_from([",", ";", "\t"]).map(lambda comma: "\n".join(comma.join(row) for row in rows))
)
ROWS = st.lists(st.one_of(st.dictionaries(WORDS, CELLS, max_size=5), CELLS), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    picture(folder / "a.png")
    picture(folder / "b.png")
    return folder


def check(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    entries, problems = read(file)
    assert entries or problems
    assert all(str(file) in problem for problem in problems)
    assert len({one.name for one in entries}) == len(entries)
    for one in entries:
        assert one.prompt.strip() == one.prompt != ""
        assert all(path.is_file() for path in (one.target, *one.controls, *([one.mask] if one.mask else [])))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json"])
@given(content=st.one_of(st.binary(max_size=200), TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes(folder: Path, ending: str, content: bytes) -> None:
    check(folder / f"list{ending}", content)


@given(rows=st.lists(st.lists(WORDS, min_size=2, max_size=5), max_size=6))
@settings(max_examples=100, deadline=None)
def test_any_csv_with_known_columns(folder: Path, rows: list[list[str]]) -> None:
    text = "\n".join(",".join(row) for row in [["image", "text", "control", "mask"], *rows])
    check(folder / "rows.csv", text.encode("utf-8", "surrogatepass"))


@given(rows=ROWS)
@settings(max_examples=150, deadline=None)
def test_any_json_objects(folder: Path, rows: list[object]) -> None:
    check(folder / "rows.jsonl", "\n".join(json.dumps(row) for row in rows).encode())
    check(folder / "rows.json", json.dumps(rows).encode())


@given(targets=st.lists(st.sampled_from(["a.png", "a.jpg", "a", "a#2.png", "a#2", "a.jpg#2", "a.jpg.png", "x/a.png"])))
def test_names_are_unique_and_those_of_earlier_rows_stay(targets: list[str]) -> None:
    names, longer = Names(), Names()
    given_names = [names.name(target) for target in targets]
    assert len(set(given_names)) == len(targets)
    assert [longer.name(target) for target in [*targets, "a.png"]][: len(targets)] == given_names
