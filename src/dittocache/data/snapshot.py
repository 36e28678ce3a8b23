"""The contents of a data set's files as of one moment."""

from __future__ import annotations

from pathlib import Path

from dittocache.data.digests import ContentIndex, Status, status_of
from dittocache.data.file_table import FileTable
from dittocache.data.pictures import picture_size
from dittocache.errors import DataError


class Snapshot:
    """Digests as of one moment: each file is looked at once, however many artifacts depend on it.

    Args:
        index: for files that the table does not have.
        table: of a folder that was looked at in one pass.
    """

    def __init__(self, index: ContentIndex, table: FileTable | None = None) -> None:
        self._index = index
        self._table = table
        self._seen: dict[Path, tuple[Status, str]] = {}

    def digest(self, file: Path) -> str:
        """As `ContentIndex.digest`."""
        row = self._row(file)
        if row is not None and self._table is not None:
            return self._table.digest(row)
        if file not in self._seen:
            self._seen[file] = self._index.status_and_digest(file)
        return self._seen[file][1]

    def size(self, file: Path) -> tuple[int, int]:
        """As `picture_size`."""
        row = self._row(file)
        return picture_size(file) if row is None or self._table is None else self._table.size(row)

    def changed_since(self, file: Path) -> bool:
        """Whether the file is gone or another than the one whose digest was given."""
        row = self._row(file)
        if row is not None and self._table is not None:
            return self._table.changed_since(row)
        try:
            return status_of(file) != self._seen[file][0]
        except DataError:
            return True

    def _row(self, file: Path) -> int | None:
        return None if self._table is None else self._table.row_of_path(file)
