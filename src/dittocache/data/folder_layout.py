"""Which files of a folder are which sample's target, caption, mask and controls: told from their names alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, field

from dittocache.data.file_table import FileTable
from dittocache.data.layout import ABSENT, Layout, layout_of
from dittocache.data.pictures import ENDINGS

_FURTHER_CONTROL = re.compile(r"(?P<base>.+)_control_(?P<number>\d+)")
_NUMBERED = re.compile(r"(?P<base>.+)_(?P<number>\d+)")
_MASK = "_mask"


@dataclass(frozen=True)
class Naming:
    """How the names of files tell whose they are.

    Attributes:
        targets, controls: with what the names of files of either folder begin; None where there are no controls.
        caption_ending: of captions, with its dot.
        numbered: whether `x_N` among the controls is a control of `x` too, where no target is called `x_N`.
    """

    targets: str
    controls: str | None
    caption_ending: str = ".txt"
    numbered: bool = False


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

    def take_numbered(self, targets: Collection[str]) -> None:
        """Count `x_N` among the further controls of `x`, where no target is called `x_N`."""
        for name, row in self.pictures.items():
            match = None if name in targets else _NUMBERED.fullmatch(name)
            if match is not None and _FURTHER_CONTROL.fullmatch(name) is None:
                self.further.setdefault(match["base"], []).append((int(match["number"]), row))


def find_layout(table: FileTable, naming: Naming, problems: list[str]) -> Layout:
    """The samples among the files of a table; names that cannot be used are added to `problems`."""
    targets, controls = _Listing(), _Listing()
    listings = [(naming.targets, targets)]
    if naming.controls is not None:
        listings.append((naming.controls, controls))
    listings.sort(key=lambda one: -len(one[0]))  # one folder may lie in the other
    caption_ending = naming.caption_ending.lower()
    for row in sorted(range(len(table.names)), key=table.names.__getitem__):
        file = table.names[row]
        prefix, listing = next(one for one in listings if file.startswith(one[0]))
        _enter(table, row, file[len(prefix) :], caption_ending, listing, problems)
    names = sorted(name for name in targets.pictures if not targets.accompanies_another(name))
    if naming.numbered:
        controls.take_numbered(targets.pictures)
    return layout_of(
        names,
        [targets.pictures[name] for name in names],
        [targets.captions.get(name, ABSENT) for name in names],
        [targets.pictures.get(name + _MASK, controls.pictures.get(name + _MASK, ABSENT)) for name in names],
        [controls.controls_of(name) for name in names],
    )


def _enter(table: FileTable, row: int, file: str, caption_ending: str, listing: _Listing, problems: list[str]) -> None:
    if not file.isascii():
        if not _is_text(file):
            problems.append(f"{str(table.path(row))!r}: the file name is not valid Unicode; rename the file")
            return
        # A set that was zipped on macOS has decomposed names for some files and composed ones for others.
        file = unicodedata.normalize("NFC", file)
    if file.lower().endswith(caption_ending):
        name, files = file[: -len(caption_ending)], listing.captions
    else:
        name, _, ending = file.rpartition(".")
        if f".{ending.lower()}" not in ENDINGS:  # `x.txt` where captions are called `x.tags.txt`
            return
        files = listing.pictures
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
