"""The store: immutable records under one folder, loose or packed, that prove themselves when read.

README.md beside this file specifies the layout. A record appears under its name only once all of its bytes are durable;
a record that does not match its checksum is never returned but moved to `quarantine/`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittocache.embeddings.recipe import Recipe
from dittocache.embeddings.store.durable import replace_file
from dittocache.embeddings.store.layout import LAYOUT_NAME, check_layout, layout_content
from dittocache.embeddings.store.local import LocalRecords
from dittocache.embeddings.store.location import location
from dittocache.embeddings.store.loose import OpenRecord, read_bytes, read_header
from dittocache.embeddings.store.maintenance import maintenance
from dittocache.embeddings.store.record import Header, pack, parse_header, unpack
from dittocache.embeddings.store.storage import base_key_of, bases_for
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import RecordCorruptError, RecordMissingError

__all__ = ["NewRecord", "OpenRecord", "Store"]


@dataclass(frozen=True)
class NewRecord:
    """A tensor that is to be stored under the key of its recipe; `provenance` is kept beside and is no part of it."""

    key: str
    tensor: torch.Tensor
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any] | None = None


class Store:
    """Records by key below one folder.

    Args:
        root: the folder; it is created by the first write.

    Raises CacheError when another version of dittocache laid the folder out.
    """

    def __new__(cls, root: Path | str) -> Store:
        if isinstance(location(root), str):
            from dittocache.embeddings.store.remote_store import RemoteStore

            cls = RemoteStore
        return super().__new__(cls)

    def __init__(self, root: Path | str) -> None:
        self.root = Path(location(root))
        self._local = LocalRecords(self.root)
        self._has_layout = self._check_layout()

    def __reduce__(self) -> tuple[type[Store], tuple[Path | str]]:
        return Store, (self.location,)  # another process opens its own files

    @property
    def location(self) -> Path | str:
        """What `Store` takes to open the same one: the folder, or the URL."""
        return self.root

    @property
    def local(self) -> LocalRecords:
        """Where the records are: for packing, garbage collection and verification."""
        return self._local

    @property
    def is_local(self) -> bool:
        """Whether records are in files that `opened` gives out."""
        return True

    def write(
        self,
        key: str,
        tensor: torch.Tensor,
        recipe: Mapping[str, Any],
        *,
        replace: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> int:
        """Store a tensor under the key of its recipe and return the record's length in bytes.

        When it returns, the record is durable. A record that is there already, as far as its header tells, stays,
        unless it is to be replaced. `provenance` (JSON values) is kept beside the recipe and is no part of the key.
        Raises StoreUnavailableError when the folder cannot be written (disk full, read-only, no permission, path too
        long), leaving nothing behind; CacheError when the key is not the recipe's.
        """
        [length] = self.write_many([NewRecord(key, tensor, recipe, provenance)], replace=replace)
        return length

    def write_many(self, records: Sequence[NewRecord], *, replace: bool = False) -> list[int]:
        """`write` for records that are ready at the same time, which costs far less than one by one.

        Returns the length in bytes of each; all of them are durable then. A record that shares rows with another one of
        them is written after it. When this fails, some of them may be stored.
        """
        lengths: dict[str, int] = {}
        for depends in (False, True):
            part = [record for record in records if (base_key_of(record.recipe) is not None) == depends]
            contents = {
                record.key: pack(record.key, record.tensor, record.recipe, record.provenance, base=self.read)
                for record in part
            }
            present = {} if replace else self.sizes(contents)
            new = {key: content for key, content in contents.items() if key not in present}
            if new:
                with unavailable(f"{_named(new)} cannot be written to {self._local.loose.folder}"):
                    self.prepare()
                    self._local.write(new)
            lengths |= present | {key: len(content) for key, content in new.items()}
        return [lengths[record.key] for record in records]

    def read(self, key: str) -> torch.Tensor:
        """The tensor, on the CPU, after its whole record was verified.

        Raises RecordMissingError, also where another record that it shares rows with cannot be read;
        RecordCorruptError after moving the record to quarantine, so that it counts as missing from then on;
        StoreUnavailableError when the folder cannot be read.
        """
        with self.opened(key) as record:
            try:
                return unpack(read_bytes(record), key, base=bases_for(key, self.read))
            except RecordCorruptError as error:
                where = self._local.quarantine(key, record)
                raise RecordCorruptError(f"record {key}: {error}; {where}. Caching again makes it anew") from error

    def fetch(self, key: str) -> bytes:
        """The whole record's bytes, not verified; raises RecordMissingError or StoreUnavailableError."""
        with self.opened(key) as record:
            return bytes(read_bytes(record))

    def __contains__(self, key: object) -> bool:
        """Whether the record is there and as long as its header promises; its bytes are verified when it is read."""
        return isinstance(key, str) and bool(self.sizes([key]))

    def sizes(self, keys: Iterable[str]) -> dict[str, int]:
        """Length in bytes of those records that are there and whole as far as can be told without reading them."""
        with unavailable(f"the store {self.root} cannot be read"):
            return self._local.sizes(keys if isinstance(keys, Collection) else set(keys))

    def bytes_of(self, key: str) -> int:
        """Length of the record in bytes; raises RecordMissingError or RecordCorruptError."""
        return self.header(key).end

    def recipe_of(self, key: str) -> Recipe:
        """What the record was made from; raises RecordMissingError or RecordCorruptError."""
        return self.header(key).recipe

    def header(self, key: str) -> Header:
        """The record's header, checked against the record's length; raises RecordMissingError or RecordCorruptError."""
        with self.opened(key) as record:
            return parse_header(read_header(record), record.length)

    def keys(self) -> Iterator[str]:
        """Keys of all records, in no particular order; whether they are whole is not looked at."""
        with unavailable(f"the store {self.root} cannot be read"):
            yield from self._local.keys()

    def sweep(self) -> int:
        """Remove what dead writers left half-written and return how many files that were.

        A temporary file is removed when its process is gone from this machine, or when it is older than an hour.
        """
        removed = 0
        with unavailable(f"the store {self.root} cannot be swept"):
            for temporary in self._local.temporaries():
                temporary.unlink(missing_ok=True)
                removed += 1
        return removed

    @contextmanager
    def opened(self, key: str) -> Iterator[OpenRecord]:
        """Where the record's bytes are, for as long as the context lasts; nothing is verified.

        Raises RecordMissingError; StoreUnavailableError when the folder cannot be read.
        """
        with unavailable(f"record {key} cannot be read from {self.root}"), ExitStack() as stack:
            try:
                record = stack.enter_context(self._local.opened(key))
            except FileNotFoundError as error:
                raise RecordMissingError(f"record {key} is not in {self.root}; cache the data set again") from error
            yield record

    def rebuild_index(self) -> int:
        """Make the pack index anew from the packs' own headers and return how many records it has.

        Reading does the same in memory when the index is missing or damaged. Raises CacheError while another process
        packs or removes records.
        """
        with maintenance(self._local):
            self._local.packed.refresh()
            index, _ = self._local.packed.rebuilt(self._local.packed.snapshot.dropped)
            self._local.packed.publish(index)
        return len(index)

    def _check_layout(self) -> bool:
        """Whether the store says its layout; raises CacheError unless it is this one."""
        layout = self.root / LAYOUT_NAME
        with unavailable(f"the store {self.root} cannot be read"):
            if not layout.exists():
                return False
            check_layout(str(self.root), layout.read_bytes())
        return True

    def prepare(self) -> None:
        """Say which layout the store has, unless it is said; it may have been cleared meanwhile. Raises OSError."""
        if self._has_layout and (self.root / LAYOUT_NAME).exists():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        replace_file(self.root / LAYOUT_NAME, layout_content())
        self._has_layout = True


def _named(keys: Collection[str]) -> str:
    first = next(iter(keys))
    return f"record {first}" if len(keys) == 1 else f"{len(keys)} records, {first} among them,"
