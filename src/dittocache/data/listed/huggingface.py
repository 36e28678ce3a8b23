"""Hugging Face data sets as tables whose pictures are files.

Pictures inside arrow and parquet are bytes: each is kept once as a file (`picture_store.py`), so that whatever follows
(digests, decoding, planning) sees files. Read are the columns of qflux (`target_image, control_images, prompt,
control_mask`), diffusers (`image, text, conditioning_image`), InstructPix2Pix (`original_image, edit_prompt,
edited_image`) and those of `roles.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dittocache.data.listed.arrow_source import Part, Source, first_line, parquet_source, saved_source
from dittocache.data.listed.hub import prepared_source
from dittocache.data.listed.kinds import kind_of
from dittocache.data.listed.picture_store import PictureStore
from dittocache.data.listed.remembered import RememberedTable
from dittocache.data.listed.roles import ColumnSettings, Roles, find_roles
from dittocache.data.listed.table import Row, Table
from dittocache.errors import DataError, StoreUnavailableError

FOLDER_NAME = "hf"


def read_arrow(path: Path, columns: ColumnSettings, memory: Path | None, problems: list[str]) -> Table | None:
    """The rows of parquet files or a folder of `save_to_disk`; None, with the reason in `problems`, if there are none.

    Args:
        columns: as of `find_roles`.
        memory: pictures and what was read are kept in its folder `hf`; without it in the user's cache folder.
    """
    source = parquet_source if kind_of(path) == "parquet" else saved_source
    return _read(lambda: source(path), columns, memory, problems)


def read_prepared(name: str, columns: ColumnSettings, memory: Path | None, problems: list[str]) -> Table | None:
    """The same for a data set of the hub that the package datasets has prepared earlier."""
    return _read(lambda: prepared_source(name), columns, memory, problems)


def _read(
    open_source: Callable[[], Source], columns: ColumnSettings, memory: Path | None, problems: list[str]
) -> Table | None:
    try:
        source = open_source()
        roles = _roles(source, columns, problems)
        return None if roles is None else _table(source, roles, _folder(memory), problems)
    except DataError as error:
        problems += error.problems or [str(error)]
    except StoreUnavailableError as error:
        problems.append(str(error))
    return None


def _roles(source: Source, columns: ColumnSettings, problems: list[str]) -> Roles | None:
    """The roles of the columns, which all parts must have."""
    roles = find_roles(source.parts[0].columns, columns, str(source.path), problems)
    if roles is None:
        return None
    if roles.prompt is None:
        problems.append(
            f"{source.path}: no column of captions among {', '.join(map(repr, source.parts[0].columns))}; say which "
            "one it is with columns.prompt"
        )
        return None
    wanting = [
        f"{source.path}: {part.name} has no column {column!r}, but {source.parts[0].name} has one"
        for part in source.parts
        for column in roles.all
        if column not in part.columns
    ]
    problems += wanting
    return None if wanting else roles


def _table(source: Source, roles: Roles, folder: Path, problems: list[str]) -> Table:
    """The rows with the pictures as files: as remembered, else read from the set."""
    remembered = RememberedTable(folder, source, roles.all)
    known = remembered.load()
    if known is not None:
        return known
    reading = _Reading(PictureStore(folder), roles, problems)
    before = len(problems)
    rows = [row for part in source.parts for row in reading.rows(source, part)]
    table = Table(source.path, source.folder, str(source.path), roles.all, rows)
    if len(problems) == before and rows:
        remembered.save(table, reading.kept)
    return table


class _Reading:
    """Reads rows once, keeping their pictures.

    Attributes:
        kept: the names of the files that hold them.
    """

    def __init__(self, store: PictureStore, roles: Roles, problems: list[str]) -> None:
        self.kept: set[str] = set()
        self._store = store
        self._roles = roles
        self._problems = problems

    def rows(self, source: Source, part: Part) -> Iterator[Row]:
        """The rows of a part; those with bytes that are no picture become problems."""
        place, prefix = (f"{part.name}, row", f"{part.name}/") if part.name else ("row", "")
        for number, cells in self._told(source, part):
            where = f"{place} {number}"
            pictures = {}
            try:
                for column in self._roles.pictures:
                    pictures[column] = self._file(cells[column])
            except DataError as error:
                self._problems.append(f"{source.path}, {where}: column {column!r} holds {error}")
                continue
            yield Row(where, {**cells, **pictures}, f"{prefix}{number:06d}")

    def _told(self, source: Source, part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows up to one that cannot be read, which becomes a problem."""
        number = -1
        try:
            for number, cells in part.rows(self._roles.all):
                yield number, cells
        except (OSError, ValueError, TypeError, NotImplementedError) as error:  # as pyarrow raises them
            where = f"{source.path}, {part.name}" if part.name else str(source.path)
            self._problems.append(f"{where}: damaged from row {number + 1} on ({first_line(error)}); fetch it again")

    def _file(self, cell: Any) -> Any:
        """What stands in a cell, with each picture's bytes replaced by the path of the file that keeps them."""
        if isinstance(cell, list):
            return [self._file(one) for one in cell]
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(content, bytes):
            name = self._store.keep(content)
            self.kept.add(name)
            return os.path.abspath(self._store.folder / name)
        return cell.get("path") if isinstance(cell, dict) else cell


def _folder(memory: Path | None) -> Path:
    if memory is not None:
        return memory / FOLDER_NAME
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dittocache" / FOLDER_NAME
