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
        folder: what relative paths are relative to; else, as musubi-tuner has it, the working directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folders = [os.fspath(folder), os.getcwd()]
        self._listings: dict[str, tuple[str, dict[str, str]]] = {}

    def find(self, path: str) -> str | None:
        """The path of the file that is meant; None where there is none."""
        for folder in self._folders:
            found = self._find(folder, path)
            if found is None and "\\" in path:
                found = self._find(folder, path.replace("\\", "/"))
            if found is not None:
                return found
        return None

    def _find(self, base: str, path: str) -> str | None:
        below, slash, name = path.rpartition("/")
        folder = os.path.join(base, below + slash)
        listing = self._listings.get(folder)
        if listing is None:
            prefix = folder if folder.endswith("/") else f"{folder}/"
            listing = self._listings[folder] = prefix, _files(folder)
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
