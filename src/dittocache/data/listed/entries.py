"""From the rows of a table to entries, with everything that is wrong in them told at once."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from dittocache.data.listed.entry import Entry, Names, unusable_character
from dittocache.data.listed.picture_files import PictureFiles
from dittocache.data.listed.roles import Roles
from dittocache.data.listed.table import Row, Table

_ROUNDABOUT = re.compile(r"(^|/)(\.{0,2}/|\.{1,2}$)")  # `./a`, `../a`, `a//b`, `/a`


class EntryReader:
    """Makes the entries of one table.

    Args:
        table: the rows; pictures are named by strings in its cells.
        roles: which of its columns hold what.
        caption_extension: ending of the file beside a target that holds its caption, where no column does.
        problems: takes what is wrong with a row, with the table's name and the row's place in it.
    """

    def __init__(self, table: Table, roles: Roles, caption_extension: str, problems: list[str]) -> None:
        self._table = table
        self._roles = roles
        self._caption_extension = caption_extension
        self._problems = problems
        self._files = PictureFiles(table.folder)
        self._names = Names()
        self._prefix = os.path.join(table.folder, "")
        self._uncontrolled: list[Row] = []
        self._seen: dict[str, str] = {}

    def entries(self) -> list[Entry]:
        """An entry for each row in which nothing is wrong."""
        entries = [entry for row in self._table.rows if (entry := self._entry(row)) is not None]
        if len(self._uncontrolled) < len(entries):
            self._tell_uncontrolled(len(entries) - len(self._uncontrolled))
        return entries

    def _entry(self, row: Row) -> Entry | None:
        before = len(self._problems)
        roles = self._roles
        targets = self._pictures(row, roles.target)
        if not targets and len(self._problems) == before:
            self._tell(row, f"no target picture in column {roles.target!r}")
        controls = [file for column in roles.controls for file in self._pictures(row, column)]
        masks = [] if roles.mask is None else self._pictures(row, roles.mask)
        for column, found in ((roles.target, targets), (roles.mask, masks)):
            if len(found) > 1:
                self._tell(row, f"{len(found)} pictures in column {column!r}; expected one")
        prompt = self._prompt(row, targets[0] if targets else None)
        if len(self._problems) > before:
            return None
        target, mask = targets[0], masks[0] if masks else None
        if row.name is None and self._is_repeated(row, "\0".join((prompt, target, mask or "", *controls))):
            return None
        if not controls:
            self._uncontrolled.append(row)
        name = row.name if row.name is not None else self._names.name(self._called(target))
        return Entry(name, Path(target), tuple(map(Path, controls)), prompt, None if mask is None else Path(mask))

    def _pictures(self, row: Row, column: str) -> list[str]:
        """The path of each picture that a cell names."""
        cell = row.cells.get(column)
        several = cell if isinstance(cell, list) else (cell,)
        return [file for one in several if (file := self._picture(row, column, one)) is not None]

    def _picture(self, row: Row, column: str, written: object) -> str | None:
        """The path of a picture; None where there is none, with the reason told unless the cell is blank."""
        if written is None:
            return None
        if not isinstance(written, str):
            self._tell(row, f"column {column!r} holds {_short(written)}; expected the name of a picture file")
            return None
        written = written.strip()
        if not written:
            return None
        file = self._files.find(written)
        if file is None:
            bad = unusable_character(written)
            missing = f"picture {_short(written)} does not exist{self._missing_from(written)}"
            self._tell(row, f"the name of the picture in column {column!r} holds {bad}; correct it" if bad else missing)
        return file

    def _missing_from(self, written: str) -> str:
        if "://" in written:
            return "; it is a web address: download the pictures and name the files"
        return "" if os.path.isabs(written) else f" in {self._table.folder}"

    def _prompt(self, row: Row, target: str | None) -> str:
        """The row's caption; an empty one with a problem told where there is none."""
        column = self._roles.prompt
        if column is None:
            return "" if target is None else self._prompt_beside(row, target)
        if row.cells.get(column) is None:
            self._tell(row, f"no caption; expected it in column {column!r}")
            return ""
        prompt = row.cells[column]
        if not isinstance(prompt, str):
            self._tell(row, f"the caption in column {column!r} is {_short(prompt)}; expected a text")
        elif bad := unusable_character(prompt):
            self._tell(row, f"the caption in column {column!r} holds {bad}; correct it")
        elif not (words := prompt.strip()):
            self._tell(row, f"the caption in column {column!r} is empty")
        else:
            return words
        return ""

    def _prompt_beside(self, row: Row, target: str) -> str:
        file = f"{os.path.splitext(target)[0]}{self._caption_extension}"
        try:
            with open(file, encoding="utf-8-sig") as stream:
                words = stream.read().strip()
        except FileNotFoundError:
            self._tell(row, f"no caption; expected it in a column 'prompt', or in {file}")
        except (OSError, UnicodeDecodeError) as error:
            self._tell(row, f"the caption {file} cannot be read as UTF-8 ({error})")
        else:
            if words:
                return words
            self._tell(row, f"the caption {file} is empty")
        return ""

    def _called(self, target: str) -> str:
        """A target's path as its sample is called: below the table's folder, in composed form (NFC)."""
        path = target.removeprefix(self._prefix)
        if path.startswith("/"):
            inside = os.path.relpath(path, self._table.folder)
            path = path if inside.startswith("..") else inside
        if _ROUNDABOUT.search(path):
            path = "/".join(part for part in os.path.normpath(path).split("/") if part not in ("..", ""))
        return path if path.isascii() else unicodedata.normalize("NFC", path)

    def _is_repeated(self, row: Row, content: str) -> bool:
        """Whether another row says just the same, which is then told."""
        earlier = self._seen.setdefault(content, row.where)
        if earlier != row.where:
            self._tell(row, f"the same as {earlier}; remove one of them (repeats trains on a set's samples more often)")
        return earlier != row.where

    def _tell_uncontrolled(self, others: int) -> None:
        """Tell of rows without control pictures in a table where others have them."""
        columns = " or ".join(repr(column) for column in self._roles.controls)
        for row in self._uncontrolled:
            self._tell(row, f"no control picture in {columns}, but {others} other row(s) have one")

    def _tell(self, row: Row, problem: str) -> None:
        self._problems.append(f"{self._table.path}, {row.where}: {problem}")


def _short(found: object) -> str:
    text = ascii(found) if isinstance(found, str) and not found.isprintable() else repr(found)
    return text if len(text) <= 120 else f"{text[:100]}...{text[-10:]}"
