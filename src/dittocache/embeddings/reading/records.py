"""Records on their straight way from disk into memory that the caller chose, verified as they pass.

A header is parsed and proven once; afterwards its bytes are only compared with a digest. Whatever is out of the
ordinary (a stored form, a store that is not on a file system, a record that does not match) is left to `Store.read`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from xxhash import xxh3_64, xxh3_64_intdigest

from dittocache.embeddings.store.record import (
    DTYPES,
    LENGTH_BYTES,
    Header,
    header_length,
    parse_header,
)
from dittocache.embeddings.store.store import OpenRecord, Store
from dittocache.errors import RecordCorruptError

HEADER_GUESS = 4096  # most headers fit: one read instead of two
CHUNK_BYTES = 1 << 18  # read and verified while it is still in the core's cache
REMEMBERED = 1 << 18  # headers; some 100 MB at most


@dataclass(frozen=True, slots=True)
class Form:
    """What a record gives when it is read, and what is needed to prove it.

    Attributes:
        dtype, shape: of the tensor as the encoder made it.
        begin, length: where the tensor's bytes begin in the record, and how long the record is.
        header_digest: of the bytes before `begin`.
        checksum: of the tensor, from the header.
        meaning: the text that the checksum covers before the tensor's bytes.
        straight: the stored bytes are the tensor's bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    length: int
    header_digest: int
    checksum: str
    meaning: bytes
    straight: bool


class RecordReader:
    """Reads records of a store; fit for any number of threads, and for use on both sides of a fork."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._process = os.getpid()
        self._forms: dict[str, Form] = {}

    def __reduce__(self) -> tuple[type[RecordReader], tuple[Store]]:
        return RecordReader, (self._store,)

    @property
    def store(self) -> Store:
        """The store; a process of its own after a fork, since open files and locks are not for sharing."""
        if self._process != os.getpid():
            self._store = Store(self._store.root)
            self._process = os.getpid()
        return self._store

    def form(self, key: str) -> Form:
        """The record's form, from memory or from its header.

        Raises RecordMissingError, RecordCorruptError or StoreUnavailableError as `Store.read` does.
        """
        form = self._forms.get(key)
        if form is None:
            form = self._read_form(key)
            while len(self._forms) >= REMEMBERED:
                self._forms.pop(next(iter(self._forms)), None)
            self._forms[key] = form
        return form

    def read_into(self, key: str, form: Form, target: memoryview) -> None:
        """Fill `target`, bytes of the form's length, with the tensor; it is verified when this returns.

        Raises as `form` does; then the target's content is unspecified.
        """
        if not form.straight or not self._read_straight(key, form, target):
            self._read_by_store(key, form, target)

    def read(self, key: str) -> torch.Tensor:
        """The tensor in memory of its own; raises as `form` does."""
        form = self.form(key)
        if not form.straight:
            return self.store.read(key)
        tensor = torch.empty(form.shape, dtype=form.dtype)
        self.read_into(key, form, bytes_of(tensor))
        return tensor

    def _read_form(self, key: str) -> Form:
        if getattr(self.store, "is_local", True):
            with self.store.opened(key) as record:
                start = os.pread(record.descriptor, min(HEADER_GUESS, record.length), record.offset)
                try:
                    begin = LENGTH_BYTES + header_length(start)
                    if begin > len(start):
                        start = os.pread(record.descriptor, min(begin, record.length), record.offset)
                    header = parse_header(start, record.length)
                    if _is_straight(header, key):
                        return _straight_form(header, start[:begin])
                except RecordCorruptError:
                    pass  # `Store.read` below finds it too, and puts the record into quarantine
        tensor = self.store.read(key)
        return Form(tensor.dtype, tuple(tensor.shape), 0, 0, 0, "", b"", straight=False)

    def _read_straight(self, key: str, form: Form, target: memoryview) -> bool:
        """Read and verify; False when anything does not match."""
        with self.store.opened(key) as record:
            if record.length != form.length:
                return False
            header = bytearray(form.begin)
            first = min(CHUNK_BYTES, len(target))
            if not _fill(record, 0, [memoryview(header), target[:first]]):
                return False
            if xxh3_64_intdigest(header) != form.header_digest:
                return False
            hasher = xxh3_64(form.meaning)
            hasher.update(target[:first])
            for place in range(first, len(target), CHUNK_BYTES):
                chunk = target[place : place + CHUNK_BYTES]
                if not _fill(record, form.begin + place, [chunk]):
                    return False
                hasher.update(chunk)
        return bool(hasher.hexdigest() == form.checksum)

    def _read_by_store(self, key: str, form: Form, target: memoryview) -> None:
        self._forms.pop(key, None) if form.straight else None
        tensor = self.store.read(key)
        if (tensor.dtype, tuple(tensor.shape)) != (form.dtype, form.shape):
            raise RecordCorruptError(
                f"record {key} was exchanged while it was read: it held {form.dtype} {list(form.shape)} and now holds "
                f"{tensor.dtype} {list(tensor.shape)}; read it again"
            )
        target[:] = bytes_of(tensor.contiguous())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which they keep alive."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _is_straight(header: Header, key: str) -> bool:
    recipe = header.recipe
    return header.key == key and recipe.get("artifact") == header.name and header.is_plain


def _straight_form(header: Header, start: bytes) -> Form:
    return Form(
        dtype=DTYPES[header.dtype],
        shape=header.shape,
        begin=header.begin,
        length=header.end,
        header_digest=xxh3_64_intdigest(start),
        checksum=header.checksum,
        meaning=header.meaning,
        straight=True,
    )


def _fill(record: OpenRecord, place: int, parts: Sequence[memoryview]) -> bool:
    """Fill the parts from `place` of the record on; False when the file ends before."""
    wanted = sum(len(part) for part in parts)
    count = os.preadv(record.descriptor, list(parts), record.offset + place)
    if count == wanted:
        return True
    for part in parts:  # a network file system may give less than was asked for
        done = min(count, len(part))
        count -= done
        place += done
        while done < len(part):
            got = os.preadv(record.descriptor, [part[done:]], record.offset + place)
            if got == 0:
                return False
            done += got
            place += got
    return True
