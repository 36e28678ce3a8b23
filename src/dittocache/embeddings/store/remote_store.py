"""The store behind a URL: the same layout and promises as in a folder, as far as an object store can keep them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from dittocache.embeddings.store.layout import LAYOUT_NAME, check_layout, layout_content
from dittocache.embeddings.store.loose import HEADER_GUESS, SUFFIX, OpenRecord
from dittocache.embeddings.store.record import LENGTH_BYTES, Header, header_length, pack, parse_header, unpack
from dittocache.embeddings.store.remote import RemoteRecords
from dittocache.embeddings.store.storage import base_key_of, bases_for
from dittocache.embeddings.store.store import NewRecord, Store
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError, StoreUnavailableError


class RemoteStore(Store):
    """Records by key below one URL; `Store(url)` gives one.

    What differs from a folder: a record is put whole, so that nobody sees it torn, and how durable it is then is up to
    the object store; nothing is packed, leased or opened; a corrupt record is copied to `quarantine/` and then removed,
    which are two steps.

    Args:
        location: such as `s3://bucket/cache`.

    Raises CacheError when the URL cannot be used, or another version of dittocache laid the store out.
    """

    def __init__(self, location: Path | str) -> None:
        self._url = str(location)
        self._records = RemoteRecords(self._url)
        self._has_layout = self._check_layout()

    @property
    def location(self) -> str:
        """The URL."""
        return self._url

    @property
    def root(self) -> Path:  # type: ignore[override]
        """There is none: raises CacheError."""
        raise self._not_local()

    @property
    def local(self) -> Any:
        """There are no files: raises CacheError."""
        raise self._not_local()

    @property
    def is_local(self) -> bool:
        """Whether records are in files that `opened` gives out."""
        return False

    def write(
        self,
        key: str,
        tensor: torch.Tensor,
        recipe: Mapping[str, Any],
        *,
        replace: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> int:
        """As `Store.write`; the record is as durable as the object store makes it.

        Raises StoreUnavailableError when the object cannot be put, after a few attempts.
        """
        content = pack(key, tensor, recipe, provenance, base=self.read)
        if not replace and (present := self.sizes([key])):
            return present[key]
        if not self._has_layout:
            self._records.put(self._records.name(LAYOUT_NAME), layout_content())
            self._has_layout = True
        self._records.put(self._records.path(key), content)
        return len(content)

    def write_many(self, records: Sequence[NewRecord], *, replace: bool = False) -> list[int]:
        """As `Store.write_many`, one after the other; threads put them side by side."""
        bases_first = sorted(records, key=lambda record: base_key_of(record.recipe) is not None)
        lengths = {
            one.key: self.write(one.key, one.tensor, one.recipe, replace=replace, provenance=one.provenance)
            for one in bases_first
        }
        return [lengths[record.key] for record in records]

    def read(self, key: str) -> torch.Tensor:
        """As `Store.read`; a record that does not prove itself is got once more before it is called corrupt."""
        try:
            return self._unpacked(key)
        except RecordCorruptError:
            content = self.fetch(key)
        try:
            return unpack(bytearray(content), key, base=bases_for(key, self.read))
        except RecordCorruptError as error:
            where = self._quarantine(key, content)
            raise RecordCorruptError(f"record {key}: {error}; {where}. Caching again makes it anew") from error

    def fetch(self, key: str) -> bytes:
        """The whole record's bytes, not verified; raises RecordMissingError or StoreUnavailableError."""
        return self._get(key)

    def sizes(self, keys: Iterable[str]) -> dict[str, int]:
        """Length in bytes of the records that are there; of many keys, from a listing of the store."""
        return self._records.sizes(keys if isinstance(keys, Collection) else set(keys))

    def header(self, key: str) -> Header:
        """The record's header, checked against the record's length; raises RecordMissingError or RecordCorruptError."""
        start = self._get(key, HEADER_GUESS)
        wanted = LENGTH_BYTES + header_length(start)
        if wanted > len(start):
            start = self._get(key, wanted)
        return parse_header(start, self._records.length(self._records.path(key)))

    def keys(self) -> Iterator[str]:
        """Keys of all records; whether they are whole is not looked at."""
        yield from self._records.keys()

    def sweep(self) -> int:
        """Nothing is ever half-written here: 0."""
        return 0

    def opened(self, key: str) -> AbstractContextManager[OpenRecord]:  # type: ignore[override]
        """Records are in no file that could be opened: raises CacheError."""
        raise self._not_local()

    def rebuild_index(self) -> int:
        """There are no packs: raises CacheError."""
        raise self._not_local()

    def _unpacked(self, key: str) -> torch.Tensor:
        return unpack(bytearray(self.fetch(key)), key, base=bases_for(key, self.read))

    def _get(self, key: str, end: int | None = None) -> bytes:
        try:
            return self._records.get(self._records.path(key), end)
        except FileNotFoundError as error:
            raise RecordMissingError(f"record {key} is not in {self._url}; cache the data set again") from error

    def _quarantine(self, key: str, content: bytes) -> str:
        """Take the record with this content out of the store, keep a copy, and say where that is."""
        name = self._records.path(key)
        target = self._records.name("quarantine", f"{key}.{time.time_ns()}{SUFFIX}")
        try:
            self._records.put(target, content)
            if self._records.get(name) != content:
                return f"another process has replaced it meanwhile, a copy is in {target}"
            self._records.remove(name)
        except FileNotFoundError:
            return "another process has taken it out of the store meanwhile"
        except StoreUnavailableError as error:
            return f"it could not be moved to {target} ({error}): remove {name}"
        return f"it was moved to {target}"

    def _check_layout(self) -> bool:
        try:
            check_layout(self._url, self._records.get(self._records.name(LAYOUT_NAME)))
        except FileNotFoundError:
            return False
        return True

    def _not_local(self) -> CacheError:
        return CacheError(
            f"the records of {self._url} are not in files of this machine; expected a folder as cache_dir for this"
        )
