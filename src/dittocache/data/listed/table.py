"""A list of samples as rows of named cells, whichever file they come from, and the file as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class Row(NamedTuple):
    """One row.

    Attributes:
        where: its place in the table, for messages: `line 7`.
        cells: column -> a string, a list of strings, or whatever else the file held.
        name: of the sample; None where it is to be called after its target.
    """

    where: str
    cells: Mapping[str, object]
    name: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of a list.

    Attributes:
        path: the file or folder that they were read from.
        folder: what relative paths in the cells are relative to.
        head: the place that names the columns, for messages.
        columns: the names of the columns in order.
        rows: all rows.
    """

    path: Path
    folder: Path
    head: str
    columns: Sequence[str]
    rows: Sequence[Row]


def read_text(path: Path, problems: list[str]) -> str | None:
    """The words of a file in UTF-8, without its byte order mark; None, with the reason in `problems`, if it cannot be.

    Line ends are left as they are.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror or error}; set data.path to the list of the samples")
        return None
    if content.startswith(_UTF16_BOMS):
        problems.append(f"{path} is in UTF-16; save it as UTF-8")
        return None
    content = content.removeprefix(_BOM)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problems.append(f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8")
        return None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        problems.append(f"{path}, line {line}: a NUL byte; the file is damaged, or no text: save it again as UTF-8")
        return None
    return text
