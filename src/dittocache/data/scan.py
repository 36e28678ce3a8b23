"""One look at the files of some folders: their names and status, nothing read."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path


def scan(
    root: Path, folders: Collection[Path], skip: Callable[[str], bool], deep: bool
) -> tuple[list[str], array[int]]:
    """Names relative to `root`, with forward slashes, and of each file its size, mtime and ctime (ns), one by one.

    Hidden files are left out; the status of what cannot be looked at is zeros. Arguments as of `FileTable.scanned`.
    """
    looked = _Scan(skip, deep, {os.fspath(folder) for folder in folders})
    for folder in folders:
        looked.enter(os.fspath(folder), prefix_below(root, folder), frozenset())
    return looked.names, looked.status


def prefix_below(root: Path, folder: Path) -> str:
    """With what the names of a folder's files begin in a table of this root."""
    below = folder.relative_to(root).as_posix()
    return "" if below == "." else f"{below}/"


@dataclass(frozen=True)
class _Scan:
    """What is looked for, and what was found so far."""

    skip: Callable[[str], bool]
    deep: bool
    listed: Collection[str]
    names: list[str] = field(default_factory=list)
    status: array[int] = field(default_factory=lambda: array("q"))

    def enter(self, folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        """List a folder and its sub-folders; one that links back to a folder above it is not entered again."""
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in above:
            return
        above |= {(found.st_dev, found.st_ino)}
        subfolders = []
        names, status, skip = self.names, self.status, self.skip
        with os.scandir(folder) as entries:
            for entry in entries:  # hundreds of thousands: nothing here that is not needed
                name = entry.name
                if name[0] == ".":
                    continue
                dot = name.rfind(".")
                if dot > 0 and not skip(name[dot:].lower()):
                    try:
                        result = entry.stat()
                    except OSError:  # a link to nowhere; reading the file says so
                        status.extend((0, 0, 0))
                    else:
                        if entry.is_dir():
                            subfolders.append(name)
                            continue
                        status.extend((result.st_size, result.st_mtime_ns, result.st_ctime_ns))
                    names.append(prefix + name)
                elif entry.is_dir():
                    subfolders.append(name)
        for name in sorted(subfolders) if self.deep else ():
            below = os.path.join(folder, name)
            if below not in self.listed:
                self.enter(below, f"{prefix}{name}/", above)
