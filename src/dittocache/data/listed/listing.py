"""Data sets that are lists: tables, folders of pictures with metadata, Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dittocache.data.config import SetConfig
from dittocache.data.listed.csv_table import read_csv
from dittocache.data.listed.entries import EntryReader
from dittocache.data.listed.entry import Entry
from dittocache.data.listed.hub import hub_snapshot
from dittocache.data.listed.huggingface import read_arrow, read_prepared
from dittocache.data.listed.json_table import read_json, read_jsonl
from dittocache.data.listed.kinds import kind_of, metadata_file
from dittocache.data.listed.roles import find_roles
from dittocache.data.listed.table import Table

_TABLES: dict[str, Callable[[Path, list[str]], Table | None]] = {
    "csv": read_csv,
    "jsonl": read_jsonl,
    "json": read_json,
}


def read_listing(path: Path, settings: SetConfig, memory: Path | None, problems: list[str]) -> list[Entry]:
    """The samples that a list names, in its order; rows with something wrong are left out and told of in `problems`.

    Captions come from the column of prompts. A table without one has them in files beside the targets (`x.txt`).
    Paths in a table are relative to its folder.

    Args:
        path: a table, or a folder or hub data set that `kind_of` does not call a plain folder.
        settings: `columns` and `caption_extension` count.
        memory: folder in which pictures that come as bytes are kept as files, with what was read; without it that is
            the user's cache folder.
        problems: takes every problem, each with the file and the row or line: none are raised.
    """
    before = len(problems)
    table = _table(path, settings, memory, problems)
    if table is None:
        return []
    if not table.rows:
        if len(problems) == before:
            problems.append(f"{path} lists no samples")
        return []
    roles = find_roles(table.columns, settings.columns, table.head, problems)
    if roles is None:
        return []
    return EntryReader(table, roles, settings.caption_extension, problems).entries()


def _table(path: Path, settings: SetConfig, memory: Path | None, problems: list[str]) -> Table | None:
    if kind_of(path) == "hub":
        found = hub_snapshot(path.as_posix())
        if found is None or kind_of(found) == "folder":
            return read_prepared(path.as_posix(), settings.columns, memory, problems)
        path = found
    kind = kind_of(path)
    if kind == "imagefolder" and (file := metadata_file(path)) is not None:
        path, kind = file, kind_of(file)
    if kind in _TABLES:
        return _TABLES[kind](path, problems)
    if kind in ("parquet", "saved"):
        return read_arrow(path, settings.columns, memory, problems)
    problems.append(
        f"{path} is no list of samples; expected a .csv, .jsonl, .json or .parquet file, a folder with metadata.jsonl "
        "or metadata.csv, or a Hugging Face data set"
    )
    return None
