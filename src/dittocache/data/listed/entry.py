"""What one row of a list says: a sample as files and words, before any picture is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    """A target picture, what it is made from, and the words that ask for it, as a list names them.

    Attributes:
        name: unique within the list, and stable between runs.
        target: the picture that the model learns to produce; the file exists.
        controls: the control pictures in order; empty for text to image.
        prompt: the caption without surrounding blanks; never empty.
        mask: an optional picture that weighs the loss.
    """

    name: str
    target: Path
    controls: tuple[Path, ...]
    prompt: str
    mask: Path | None = None


class Names:
    """Gives rows names that stay what they are when other rows change.

    A row is called as its target without the ending (`cats/a`). Where another target has that name already it keeps its
    ending (`cats/a.jpg`); where another row makes the same target from something else, its number follows (`cats/a#2`).
    """

    def __init__(self) -> None:
        self._target_of: dict[str, str] = {}
        self._rows: dict[str, int] = {}
        self._given: set[str] = set()

    def name(self, target: str) -> str:
        """The name for the next row that makes this target.

        Args:
            target: the picture's path as the list is to call it, with forward slashes and its ending.
        """
        stem = os.path.splitext(target)[0]
        base = stem if self._target_of.setdefault(stem, target) == target else target
        rows = self._rows[target] = self._rows.get(target, 0) + 1
        name = base if rows == 1 else f"{base}#{rows}"
        while name in self._given:  # a file may truly be called `a#2`
            name += "_"
        self._given.add(name)
        return name


def unusable_character(text: str) -> str | None:
    """What in a text is no character that a file name or caption may hold; None where all is well."""
    if "\0" in text:
        return "a NUL byte"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"\\u{ord(text[error.start]):04x}, half of a surrogate pair"
    return None
