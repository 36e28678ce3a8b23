"""JSON lines, one object a line, and JSON files that hold a list of such objects.

Read are the keys of musubi-tuner (`image_path, caption, control_path, control_path_0, ...`), of diffusers
(`file_name, text`) and those of `roles.py`; a key may hold a list of control pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from dittocache.data.listed.table import Row, Table, read_text


def read_jsonl(path: Path, problems: list[str]) -> Table | None:
    """The objects of a file of JSON lines; damaged lines are left out and told of in `problems`."""
    text = read_text(path, problems)
    if text is None:
        return None
    return _table(path, _lines(path, text, problems), problems)


def read_json(path: Path, problems: list[str]) -> Table | None:
    """The objects of a JSON file with one list of them; None, with the reason in `problems`, for any other."""
    text = read_text(path, problems)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: no JSON ({_reason(error, lines=True)})")
        return None
    if not isinstance(found, list):
        problems.append(f"{path} holds {_kind(found)}; expected a list of objects, one for each sample")
        return None
    return _table(path, ((f"entry {number}", one) for number, one in enumerate(found, start=1)), problems)


def _lines(path: Path, text: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    """What each line that is not blank holds, with its place."""
    for number, line in enumerate(text.split("\n"), start=1):  # other separators are part of captions
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}, {where}: no JSON ({_reason(error, lines=False)})")
            continue
        yield where, found


def _table(path: Path, found: Iterable[tuple[str, object]], problems: list[str]) -> Table:
    rows = []
    columns: dict[str, None] = {}  # in the order in which they first appear
    for where, cells in found:
        if not isinstance(cells, dict):
            problems.append(f'{path}, {where}: {_kind(cells)}; expected an object such as {{"file_name": ...}}')
            continue
        if not cells.keys() <= columns.keys():
            columns.update(dict.fromkeys(cells))
        rows.append(Row(where, cells))
    return Table(path, path.parent, str(path), list(columns), rows)


def _reason(error: Exception, lines: bool) -> str:
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno}, column {error.colno}" if lines else f"column {error.colno}"
        return f"{place}: {error.msg}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(found: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(found), "a number")
