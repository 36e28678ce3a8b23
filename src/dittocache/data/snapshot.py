"""The contents of a data set's files as of one moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dittocache.data.digests import ContentIndex, Status, status_of
from dittocache.data.file_table import FileTable
from dittocache.data.pictures import picture_size
from dittocache.errors import DataError


class Snapshot:
    """Digests as of one moment: each file is looked at once, however many artifacts depend on it.

    Args:
        index: for files that no table has.
        tables: of data sets that were looked at in one pass.
    """

    def __init__(self, index: ContentIndex, tables: Sequence[FileTable] = ()) -> None:
        self._index = index
        self._tables = tuple(tables)
        self._seen: dict[Path, tuple[Status, str]] = {}

    def digest(self, file: Path) -> str:
        """As `ContentIndex.digest`."""
        table, row = self._row(file)
        if table is not None:
            return table.digest(row)
        if file not in self._seen:
            self._seen[file] = self._index.status_and_digest(file)
        return self._seen[file][1]

    def size(self, file: Path) -> tuple[int, int]:
        """As `picture_size`."""
        table, row = self._row(file)
        return picture_size(file) if table is None else table.size(row)

    def changed_since(self, file: Path) -> bool:
        """Whether the file is gone or another than the one whose digest was given."""
        table, row = self._row(file)
        if table is not None:
            return table.changed_since(row)
        try:
            return status_of(file) != self._seen[file][0]
        except DataError:
            return True

    def _row(self, file: Path) -> tuple[FileTable | None, int]:
        for table in self._tables:
            row = table.row_of_path(file)
            if row is not None:
                return table, row
        return None, 0
