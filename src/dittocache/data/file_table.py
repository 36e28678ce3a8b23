"""What is known of the files of one data set: looked at in one pass, read once for as long as they do not change.

A row is a file. Its facts (a picture's size, a caption's words, a digest) count for as long as the file's status is the
one with which they were read, under the rules of `digests.py`: ctime is part of it, and what was read within the
clock's granularity of the file's last change is read again. Columns instead of objects, because a data set has 300,000
files and a plan of an unchanged one must not look at each of them in Python.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dittocache.data import digests
from dittocache.data.columns import Columns
from dittocache.data.digests import DIGEST_BYTES, Status, hash_file, status_of, text_digest
from dittocache.data.pictures import picture_size
from dittocache.data.scan import scan
from dittocache.errors import DataError

READERS = 8  # threads; on network mounts and spinning disks reading waits more than it computes
_NEVER = 0

Rows = npt.NDArray[np.int64]


@dataclass
class FileTable:
    """The files below `root`, each with what is known of it.

    Attributes:
        names: paths relative to the root, with forward slashes, in the order in which the system lists them.
        status: size in bytes, mtime and ctime in nanoseconds `(files, 3)` int64; zeros where it could not be told.
        read_at: when the first of a file's facts was read, nanoseconds `(files,)` int64; 0 for a file without facts.
        sizes: width and height of pictures `(files, 2)` int32, 0 where not read.
        digests: `(files, 16)` uint8; of a caption that of its words.
        digested: whether a file's digest is known `(files,)`.
        texts: row -> the words of a caption.
        altered: whether something was learnt since the table was loaded.
    """

    root: Path
    names: Sequence[str]
    status: npt.NDArray[np.int64]
    read_at: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    digests: npt.NDArray[np.uint8]
    digested: npt.NDArray[np.bool_]
    texts: dict[int, str] = field(default_factory=dict)
    altered: bool = False

    @classmethod
    def scanned(
        cls, root: Path, folders: Collection[Path], skip: Callable[[str], bool], deep: bool = True
    ) -> FileTable:
        """The files of some folders below the root, or of the root itself, nothing read yet; hidden ones are left out.

        Args:
            skip: whether files of this ending (with its dot, in lower case) are no part of the table.
            deep: whether sub-folders belong to a folder; those that are in `folders` themselves never do.
        """
        return cls._unread(root, *scan(root, folders, skip, deep))

    @classmethod
    def of_files(cls, files: Iterable[Path]) -> FileTable:
        """Files anywhere on this machine, each once, nothing read yet; the root is that of the file system."""
        root = os.path.abspath(os.sep)
        paths = list(dict.fromkeys(os.path.abspath(file) for file in files))
        status = array("q")
        for path in paths:
            try:
                found = os.stat(path)
            except OSError:  # reading the file says so
                status.extend((0, 0, 0))
            else:
                status.extend((found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        return cls._unread(Path(root), [path[len(root) :] for path in paths], status)

    @classmethod
    def _unread(cls, root: Path, names: Sequence[str], status: array[int]) -> FileTable:
        count = len(names)
        return cls(
            root,
            names,
            np.frombuffer(status, np.int64).reshape(count, 3),
            np.full(count, _NEVER, np.int64),
            np.zeros((count, 2), np.int32),
            np.zeros((count, DIGEST_BYTES), np.uint8),
            np.zeros(count, np.bool_),
        )

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """The row of each file by its path relative to the root."""
        return dict(zip(self.names, range(len(self.names)), strict=True))

    def row_of_path(self, file: Path) -> int | None:
        """The row of a file below the root; None for any other."""
        prefix, path = os.path.join(os.fspath(self.root), ""), os.fspath(file)
        return self.row_of.get(path[len(prefix) :].replace(os.sep, "/")) if path.startswith(prefix) else None

    def path(self, row: int) -> Path:
        """Where the file is."""
        return Path(self.root, self.names[row])

    def learn(self, known: FileTable) -> None:
        """Take over the facts of files that have not changed since `known` read them."""
        if len(known.names) == 0:
            self.altered = True
            return
        same_names = self.names == known.names
        if same_names:
            rows = np.arange(len(self.names))
        else:
            row_of = known.row_of
            rows = np.array([row_of.get(name, -1) for name in self.names], np.int64)
        ours = np.flatnonzero(rows >= 0)
        theirs = rows[ours]
        newest = np.maximum(self.status[ours, 1], self.status[ours, 2])
        trusted = (self.status[ours] == known.status[theirs]).all(axis=1)
        trusted &= newest + digests.GRANULARITY_NS < known.read_at[theirs]
        if same_names and (trusted | (known.read_at == _NEVER)).all():
            self.read_at, self.sizes, self.digests = known.read_at, known.sizes, known.digests
            self.digested, self.texts = known.digested, known.texts
            return
        ours, theirs = ours[trusted], theirs[trusted]
        for column in ("read_at", "sizes", "digests", "digested"):
            getattr(self, column)[ours] = getattr(known, column)[theirs]
        moved = dict(zip(theirs.tolist(), ours.tolist(), strict=True))
        self.texts = {moved[row]: text for row, text in known.texts.items() if row in moved}
        self.altered = True

    def size(self, row: int) -> tuple[int, int]:
        """(width, height) of a picture, read when it is not known; raises DataError as `picture_size`."""
        if not self.sizes[row].all():
            with _Reading(self, row):
                size = picture_size(self.path(row))
            self.sizes[row] = size
        width, height = self.sizes[row].tolist()
        return width, height

    def text(self, row: int) -> str:
        """The words of a caption without surrounding blanks, read when not known; raises OSError or ValueError."""
        if row not in self.texts:
            with _Reading(self, row):
                words = self.path(row).read_text(encoding="utf-8-sig").strip()
            self.texts[row] = words
            self.digests[row] = np.frombuffer(bytes.fromhex(text_digest(words)), np.uint8)
            self.digested[row] = True
        return self.texts[row]

    def digest(self, row: int) -> str:
        """The digest of a file's content, read when it is not known; raises DataError."""
        if not self.digested[row]:
            with _Reading(self, row):
                digest = hash_file(self.path(row))
            self.digests[row] = np.frombuffer(bytes.fromhex(digest), np.uint8)
            self.digested[row] = True
        found: bytes = self.digests[row].tobytes()
        return found.hex()

    def read_sizes(self, rows: Rows) -> None:
        """Read the sizes of those pictures that are not known, several at once; `size` tells of problems later."""
        _at_once(self.size, rows[~self.sizes[rows].all(axis=1)])

    def read_digests(self, rows: Rows) -> None:
        """The same for digests; `digest` tells of problems later."""
        _at_once(self.digest, rows[~self.digested[rows]])

    def changed_since(self, row: int) -> bool:
        """Whether the file is gone or another than the one in the table."""
        try:
            return status_of(self.path(row)) != self._status(row)
        except DataError:
            return True

    def _status(self, row: int) -> Status:
        size, mtime, ctime = self.status[row].tolist()
        return size, mtime, ctime

    def to_columns(self) -> tuple[dict[str, object], Columns]:
        """What is known, for `save_columns`."""
        head: dict[str, object] = {
            "root": os.path.abspath(self.root),
            "names": list(self.names),
            "texts": list(self.texts.values()),
        }
        columns: Columns = {
            "status": self.status,
            "read_at": self.read_at,
            "sizes": self.sizes,
            "digests": self.digests,
            "digested": self.digested,
            "text_rows": np.array(list(self.texts), np.int64),
        }
        return head, columns

    @classmethod
    def from_columns(
        cls, root: Path, head: Mapping[str, object], columns: Mapping[str, npt.NDArray[np.generic]]
    ) -> FileTable:
        """The reverse; raises ValueError or KeyError for what `to_columns` did not give, or another root's."""
        names, texts = head["names"], head["texts"]
        if head["root"] != os.path.abspath(root) or not (isinstance(names, list) and isinstance(texts, list)):
            raise ValueError("it was made for another folder")
        count = len(names)
        table = cls(
            root,
            names,
            columns["status"].astype(np.int64, copy=False).reshape(count, 3),
            columns["read_at"].astype(np.int64, copy=False).reshape(count),
            columns["sizes"].astype(np.int32).reshape(count, 2),
            columns["digests"].astype(np.uint8).reshape(count, DIGEST_BYTES),
            columns["digested"].astype(np.bool_).reshape(count),
        )
        table.texts = dict(zip(columns["text_rows"].tolist(), texts, strict=True))
        return table


class _Reading:
    """While a fact of a file is read: the file must be before and after what the table says it is."""

    def __init__(self, table: FileTable, row: int) -> None:
        self._table = table
        self._row = row
        self._began = 0

    def __enter__(self) -> None:
        self._began = time.time_ns()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        table, row = self._table, self._row
        if table.changed_since(row):
            raise DataError(f"{table.path(row)} changed while it was read; wait until it is complete, then start again")
        if table.read_at[row] == _NEVER:
            table.read_at[row] = self._began
        table.altered = True


def _at_once(read: Callable[[int], object], rows: Rows) -> None:
    def attempt(row: int) -> None:
        try:
            read(row)
        except DataError:
            return  # whoever asks for this file is told

    if len(rows):
        with ThreadPoolExecutor(READERS, thread_name_prefix="files") as readers:
            for _ in readers.map(attempt, rows.tolist()):
                pass
