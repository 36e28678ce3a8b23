"""CSV: comma, semicolon or tab between the fields, quotes around captions with line breaks; the first line names them.

Read are the columns of qflux (`path_target, path_control, path_control_1, ..., prompt, path_mask`), of diffusers
(`file_name, text`) and those of `roles.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from dittocache.data.listed.table import Row, Table, read_text

DELIMITERS = (",", ";", "\t")


def read_csv(path: Path, problems: list[str]) -> Table | None:
    """The rows of a CSV file; None, with the reasons in `problems`, where it has no line of column names.

    Damaged rows are left out and told of in `problems`: fields that no column is for, quotes that do not end.
    """
    text = read_text(path, problems)
    if text is None:
        return None
    lines = _lines(text)
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        problems.append(f"{path} is empty; expected a line of column names, such as 'target,prompt'")
        return None
    records = _records(path, lines, first, _delimiter(lines[first]), problems)
    before = len(problems)
    head = next(records, None)
    if head is None or head[0] != first + 1:
        if len(problems) == before:
            problems.append(f"{path}, line {first + 1}: no column names; expected a line such as 'target,prompt'")
        return None
    columns = [column.strip() for column in head[1]]
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        problems.append(f"{path}, line {first + 1}: column {twice[0]!r} is there twice; rename one of them")
        return None
    rows = []
    for line, fields in records:
        if len(fields) > len(columns) and any(fields[len(columns) :]):
            problems.append(
                f"{path}, line {line}: {len(fields)} fields, but there are {len(columns)} columns; put quotes around a "
                "caption that holds the delimiter"
            )
            continue
        rows.append(Row(f"line {line}", dict(zip(columns, fields, strict=False))))
    named = [column for column in columns if column]
    return Table(path, path.parent, f"{path}, line {first + 1}", named, rows)


def _lines(text: str) -> list[str]:
    """Lines with their ends; only line feeds and carriage returns end one, other separators are part of captions."""
    return [f"{line}\n" for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]


def _delimiter(head: str) -> str:
    """What parts the column names; a line of captions is no guide, because commas are part of them."""

    def fields(delimiter: str) -> int:
        try:
            return len(next(csv.reader([head], delimiter=delimiter), []))
        except csv.Error:  # told of when the line is read
            return 0

    return max(DELIMITERS, key=fields)


def _records(
    path: Path, lines: Sequence[str], first: int, delimiter: str, problems: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank with the number of the line on which it begins; damaged ones become problems."""
    reader = csv.reader(lines[first:], delimiter=delimiter, strict=True)
    while True:
        begins = first + reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(
                f"{path}, line {begins}: damaged ({error}); check its quotes: a quote inside is written twice"
            )
            continue
        if any(fields):
            yield begins, fields
