"""Which of the files that a list names exist, told from listings of their folders instead of a look at each file."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path


class PictureFiles:
    """Finds files by the paths that a list gives, each folder listed once.

    A file is also found under the other Unicode form of its name (macOS writes é as two characters), and where the
    list was written on Windows, with backslashes.

    Args:
        folder: what relative paths are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.fspath(folder)
        self._listings: dict[str, tuple[str, dict[str, str]]] = {}

    def find(self, path: str) -> str | None:
        """The path of the file that is meant; None where there is none."""
        found = self._find(path)
        if found is None and "\\" in path:
            found = self._find(path.replace("\\", "/"))
        return found

    def _find(self, path: str) -> str | None:
        below, slash, name = path.rpartition("/")
        listing = self._listings.get(below + slash)
        if listing is None:
            folder = os.path.join(self._folder, below + slash)
            prefix = folder if folder.endswith("/") else f"{folder}/"
            listing = self._listings[below + slash] = prefix, _files(folder)
        prefix, actual = listing[0], listing[1].get(name)
        if actual is None:
            actual = listing[1].get(unicodedata.normalize("NFC", name))
        if actual is None and _is_file(prefix + name):  # a file system may not tell upper from lower case
            actual = name
        return None if actual is None else prefix + actual


def _files(folder: str) -> dict[str, str]:
    """The files of a folder: under their names, and under those in composed form."""
    names: dict[str, str] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if not entry.is_file():
                        continue
                except OSError:  # a link that leads in circles
                    continue
                name = entry.name
                names[name] = name
                if not name.isascii():
                    names.setdefault(unicodedata.normalize("NFC", name), name)
    except (OSError, ValueError):
        return {}  # whoever asks for a file in it is told that there is none
    return names


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:
        return False
