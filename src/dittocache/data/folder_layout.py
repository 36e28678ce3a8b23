"""Which files of a folder are which sample's target, caption, mask and controls: told from their names alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dittocache.data.columns import Columns
from dittocache.data.file_table import FileTable, Rows

ABSENT = -1
_FURTHER_CONTROL = re.compile(r"(?P<base>.+)_control_(?P<number>\d+)")
_MASK = "_mask"


@dataclass(frozen=True)
class FolderLayout:
    """The samples of a folder, in the order of their names, by the rows of their files in its table.

    Attributes:
        names: the path inside the target folder without its ending, in Unicode's composed form (NFC).
        targets, captions, masks: a row for each sample; -1 where it has none.
        control_starts: where each sample's controls begin in `controls`, and where the last one's end.
        controls: rows, sample after sample, in order.
    """

    names: Sequence[str]
    targets: Rows
    captions: Rows
    masks: Rows
    control_starts: Rows
    controls: Rows

    def controls_of(self, number: int) -> list[int]:
        """The rows of one sample's controls."""
        rows: list[int] = self.controls[self.control_starts[number] : self.control_starts[number + 1]].tolist()
        return rows

    def to_columns(self) -> tuple[dict[str, object], Columns]:
        """The layout, for `save_columns`."""
        columns: Columns = {
            "layout.targets": self.targets,
            "layout.captions": self.captions,
            "layout.masks": self.masks,
            "layout.control_starts": self.control_starts,
            "layout.controls": self.controls,
        }
        return {"names": list(self.names)}, columns

    @classmethod
    def from_columns(
        cls, head: Mapping[str, Sequence[str]], columns: Mapping[str, npt.NDArray[np.generic]]
    ) -> FolderLayout:
        """The reverse."""
        names = ("targets", "captions", "masks", "control_starts", "controls")
        return cls(head["names"], *(columns[f"layout.{name}"].astype(np.int64, copy=False) for name in names))


@dataclass
class _Listing:
    """The files of one folder by name."""

    pictures: dict[str, int] = field(default_factory=dict)
    captions: dict[str, int] = field(default_factory=dict)
    further: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def controls_of(self, name: str) -> list[int]:
        """`x`, then `x_control_N` in the order of N as a number."""
        first = [self.pictures[name]] if name in self.pictures else []
        return [*first, *(row for _, row in sorted(self.further.get(name, ())))]

    def accompanies_another(self, name: str) -> bool:
        """Whether this picture is a further control or the mask of another picture of this folder."""
        if name in self.captions:
            return False
        if name.endswith(_MASK) and name[: -len(_MASK)] in self.pictures:
            return True
        match = _FURTHER_CONTROL.fullmatch(name) if "_control_" in name else None
        return match is not None and match["base"] in self.pictures


def find_layout(table: FileTable, target_prefix: str, control_prefix: str | None, problems: list[str]) -> FolderLayout:
    """The samples among the files of a table; names that cannot be used are added to `problems`.

    Args:
        target_prefix, control_prefix: with what the names of files of either folder begin; None where there are no
            controls.
    """
    targets, controls = _Listing(), _Listing()
    for row in sorted(range(len(table.names)), key=table.names.__getitem__):
        file = table.names[row]
        if file.startswith(target_prefix):
            _enter(table, row, file[len(target_prefix) :], targets, problems)
        elif control_prefix is not None:
            _enter(table, row, file[len(control_prefix) :], controls, problems)
    names = sorted(name for name in targets.pictures if not targets.accompanies_another(name))
    controls_of = [controls.controls_of(name) for name in names]
    masks = [targets.pictures.get(name + _MASK, controls.pictures.get(name + _MASK, ABSENT)) for name in names]
    return FolderLayout(
        names,
        np.array([targets.pictures[name] for name in names], np.int64),
        np.array([targets.captions.get(name, ABSENT) for name in names], np.int64),
        np.array(masks, np.int64),
        np.concatenate([[0], np.cumsum([len(rows) for rows in controls_of], dtype=np.int64)]).astype(np.int64),
        np.array([row for rows in controls_of for row in rows], np.int64),
    )


def _enter(table: FileTable, row: int, file: str, listing: _Listing, problems: list[str]) -> None:
    if not file.isascii():
        if not _is_text(file):
            problems.append(f"{str(table.path(row))!r}: the file name is not valid Unicode; rename the file")
            return
        # A set that was zipped on macOS has decomposed names for some files and composed ones for others.
        file = unicodedata.normalize("NFC", file)
    name, _, ending = file.rpartition(".")
    files = listing.captions if ending.lower() == "txt" else listing.pictures
    if name in files:
        other = table.path(files[name]).name
        problems.append(f"{table.path(row)}: {other} has the same name; rename or remove one of them")
        return
    files[name] = row
    if files is listing.pictures and "_control_" in name:
        match = _FURTHER_CONTROL.fullmatch(name)
        if match is not None:
            listing.further.setdefault(match["base"], []).append((int(match["number"]), row))


def _is_text(name: str) -> bool:
    """Whether the operating system's bytes for this name are text, so that names can be written to JSON."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
