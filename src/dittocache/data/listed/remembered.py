"""What was read of a data set of pictures as bytes, so that gigabytes are not read again while nothing has changed.

It counts while the files of the set have the status with which they were read (size, mtime, ctime; under the rule of
`data/digests.py` for changes within the clock's granularity), and every picture that was kept has its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dittocache.data.columns import load_columns, save_columns
from dittocache.data.digests import GRANULARITY_NS, status_of, text_digest
from dittocache.data.listed.arrow_source import Source
from dittocache.data.listed.table import Row, Table
from dittocache.errors import DataError

VERSION = 1


class RememberedTable:
    """The memory of one data set, read for certain columns, in one file of the folder that keeps its pictures."""

    def __init__(self, folder: Path, source: Source, columns: Sequence[str]) -> None:
        key = json.dumps([os.path.abspath(source.path), list(columns)])
        self._file = folder / f"rows-{text_digest(key)}.columns"
        self._folder = folder
        self._source = source
        self._columns = list(columns)
        self._files = _statuses(source.files)
        self._read_at = time.time_ns()

    def load(self) -> Table | None:
        """The rows; None where nothing is remembered, or something has changed since."""
        try:
            head, _ = load_columns(self._file)
            if head["version"] != VERSION or head["files"] != self._files or not self._files:
                return None
            if max(max(status[1:]) for _, *status in head["files"]) + GRANULARITY_NS >= head["read_at"]:
                return None
            if head["folder"] != os.path.abspath(self._folder) or not self._holds(head["pictures"]):
                return None
            rows = [Row(where, cells, name) for where, cells, name in head["rows"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # everything in it can be read again
        return Table(self._source.path, self._source.folder, str(self._source.path), self._columns, rows)

    def save(self, table: Table, pictures: set[str]) -> None:
        """Remember rows whose pictures are kept under these names; one that cannot be saved costs time only."""
        head = {
            "version": VERSION,
            "files": self._files,
            "read_at": self._read_at,
            "folder": os.path.abspath(self._folder),
            "pictures": {name: status for name, status in _kept(self._folder).items() if name in pictures},
            "rows": [(row.where, row.cells, row.name) for row in table.rows],
        }
        if _statuses(self._source.files) != self._files:
            return
        try:
            save_columns(self._file, head, {})
        except OSError:
            return

    def _holds(self, pictures: dict[str, Any]) -> bool:
        kept = _kept(self._folder)
        return all(kept.get(name) == status for name, status in pictures.items())


def _statuses(files: Sequence[Path]) -> list[list[Any]]:
    """Path, size, mtime and ctime of each file; none where one cannot be told."""
    try:
        return [[os.path.abspath(file), *status_of(file)] for file in files]
    except DataError:
        return []


def _kept(folder: Path) -> dict[str, list[int]]:
    """Size, mtime and ctime of each file in a folder."""
    found: dict[str, list[int]] = {}
    if not folder.is_dir():
        return found
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                status = entry.stat()
                found[entry.name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return found
