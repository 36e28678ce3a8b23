"""Records on their straight way from disk into memory that the caller chose, verified as they pass.

A header is parsed and proven once; afterwards its bytes are only compared with a digest. Whatever does not match is
left to `Store.read`, which knows what to do about it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from xxhash import xxh3_64, xxh3_64_intdigest

from dittocache.embeddings.reading.buffers import Buffers
from dittocache.embeddings.store.header import DTYPES, Header, parse_header
from dittocache.embeddings.store.loose import OpenRecord, read_header
from dittocache.embeddings.store.record import restore, verify_header
from dittocache.embeddings.store.storage import base_key_of, bases_for
from dittocache.embeddings.store.store import Store
from dittocache.errors import RecordCorruptError

CHUNK_BYTES = 1 << 18  # read and verified while it is still in the core's cache
LONG_BYTES = 1 << 20  # longer records are announced to the system
REMEMBERED = 1 << 18  # headers; some 100 MB

ReadBase = Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """What a record gives when it is read, and what is needed to prove it.

    Attributes:
        dtype, shape: of the tensor as the encoder made it.
        begin, length: where the tensors' bytes begin in the record, and how long the record is.
        header_digest: of the bytes before `begin`.
        checksum, meaning: of the bytes after it, and the text that the checksum covers before them.
        restoring: the header, where the bytes are not the tensor's own.
        base_key: of the record that it shares rows with.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    length: int
    header_digest: int
    checksum: str
    meaning: bytes
    restoring: Header | None
    base_key: str | None


class RecordReader:
    """Reads records of a store; fit for any number of threads, and for use on both sides of a fork."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._process = os.getpid()
        self._forms: dict[str, Form] = {}
        self._scratch = Buffers(pin=False)

    @property
    def store(self) -> Store:
        """The store; a process of its own after a fork, since open files and locks are not for sharing."""
        if self._process != os.getpid():
            self._store = Store(self._store.location)
            self._scratch = Buffers(pin=False)
            self._process = os.getpid()
        return self._store

    def form(self, key: str) -> Form:
        """The record's form, from memory or from its header.

        Raises RecordMissingError, RecordCorruptError or StoreUnavailableError as `Store.read` does.
        """
        form = self._forms.get(key)
        if form is not None:
            return form
        store = self.store
        if not store.is_local:
            return self._remember(key, store.header(key), b"")
        with store.opened(key) as record:
            return self._form_of(key, record)

    def read_into(self, target: torch.Tensor, key: str, form: Form, read_base: ReadBase | None = None) -> None:
        """Fill a contiguous tensor of the form's dtype and shape; it is verified when this returns.

        `read_base` gives the tensor of a record that this one shares rows with, by default from the store.
        Raises as `form` does; then the target's content is unspecified.
        """
        if self.store.is_local:
            with self.store.opened(key) as record:
                if self._read_straight(record, target, key, form, read_base or self.read):
                    return
            self._forms.pop(key, None)
        self._read_by_store(target, key, form)

    def read(self, key: str) -> torch.Tensor:
        """The tensor in memory of its own; raises as `form` does."""
        if not self.store.is_local:
            return self.store.read(key)
        with self.store.opened(key) as record:
            form = self._forms.get(key) or self._form_of(key, record)
            tensor = torch.empty(form.shape, dtype=form.dtype)
            if self._read_straight(record, tensor, key, form, self.read):
                return tensor
        self._forms.pop(key, None)
        return self.store.read(key)

    def _form_of(self, key: str, record: OpenRecord) -> Form:
        try:
            start = read_header(record)
            header = parse_header(start, record.length)
            return self._remember(key, header, start[: header.begin])
        except RecordCorruptError:
            self.store.read(key)  # finds it too, and puts the record into quarantine
            raise

    def _remember(self, key: str, header: Header, start: bytes) -> Form:
        form = _form(header, start, key)
        while len(self._forms) >= REMEMBERED:
            self._forms.pop(next(iter(self._forms)), None)
        self._forms[key] = form
        return form

    def _read_straight(
        self, record: OpenRecord, target: torch.Tensor, key: str, form: Form, read_base: ReadBase
    ) -> bool:
        """Read, verify and restore; False when anything in the record does not match."""
        if form.restoring is None:
            return _read_verified(record, form, bytes_of(target))
        content = self._scratch.take(form.length - form.begin).data
        if not _read_verified(record, form, content):
            return False
        base = None if form.base_key is None else bases_for(key, read_base)(form.base_key)
        try:
            restore(form.restoring, content, base, out=target)
        except RecordCorruptError:
            return False
        return True

    def _read_by_store(self, target: torch.Tensor, key: str, form: Form) -> None:
        tensor = self.store.read(key)
        if (tensor.dtype, tuple(tensor.shape)) != (form.dtype, form.shape):
            self._forms.pop(key, None)
            raise RecordCorruptError(
                f"record {key} was exchanged while it was read: it held {form.dtype} {list(form.shape)} and now holds "
                f"{tensor.dtype} {list(tensor.shape)}; read it again"
            )
        target.copy_(tensor)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which they keep alive."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _form(header: Header, start: bytes, key: str) -> Form:
    recipe = verify_header(header, key)
    return Form(
        dtype=DTYPES[header.dtype],
        shape=header.shape,
        begin=header.begin,
        length=header.end,
        header_digest=xxh3_64_intdigest(start),
        checksum=header.checksum,
        meaning=header.meaning,
        restoring=None if header.is_plain else replace(header, recipe_json=""),
        base_key=base_key_of(recipe) if header.needs_base else None,
    )


def _read_verified(record: OpenRecord, form: Form, target: memoryview) -> bool:
    """Read the bytes after the header; False when anything does not match."""
    if record.length != form.length:
        return False
    if record.length > LONG_BYTES:
        _announce(record)
    start = memoryview(bytearray(form.begin))
    chunk = target[:CHUNK_BYTES]
    if not _fill(record, 0, (start, chunk)) or xxh3_64_intdigest(start) != form.header_digest:
        return False
    hasher = xxh3_64(form.meaning)
    if form.restoring is None:
        hasher.update(chunk)
    for place in range(CHUNK_BYTES, len(target), CHUNK_BYTES):
        chunk = target[place : place + CHUNK_BYTES]
        if not _fill(record, form.begin + place, (chunk,)):
            return False
        if form.restoring is None:
            hasher.update(chunk)
    if form.restoring is not None:
        for part in form.restoring.parts:  # the checksum covers them by name, not by place
            hasher.update(target[part.begin - form.begin : part.end - form.begin])
    return bool(hasher.hexdigest() == form.checksum)


def _announce(record: OpenRecord) -> None:
    """Where the system offers it, let it fetch all of a long record that is not in memory, not piece by piece."""
    if hasattr(os, "RWF_NOWAIT"):
        try:
            os.preadv(record.descriptor, [bytearray(1)], record.offset + record.length - 1, os.RWF_NOWAIT)
        except BlockingIOError:
            os.posix_fadvise(record.descriptor, record.offset, record.length, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # the file system cannot tell


def _fill(record: OpenRecord, place: int, parts: Sequence[memoryview]) -> bool:
    """Fill the parts from `place` of the record on; False when the file ends before."""
    wanted = sum(map(len, parts))
    count = os.preadv(record.descriptor, parts, record.offset + place)
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
