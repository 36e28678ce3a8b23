"""The pack index: which pack holds a key, and where; one sorted file, looked up in microseconds, published whole.

8 bytes   magic
8         xxh3_64 of everything behind it, little-endian as all numbers here
8         number of packs
8         number of records n
8         length of the list of packs, padding included
...       names and lengths of the packs, as JSON, padded with spaces to a multiple of 8
n * 8     first halves of the keys, as numbers, ascending
n * 8     second halves of the keys; ascending where the first halves are equal
n * 8     offset of the record in its pack
n * 8     length of the record
n * 4     number of the pack in the list
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64, xxh3_64_intdigest

from dittocache.errors import CacheError

MAGIC = b"DITTOIX2"
_HEAD = struct.Struct("<8sQQQQ")
_ROW_BYTES = 4 * 8 + 4
_LOW = (1 << 64) - 1

Numbers = npt.NDArray[np.uint64]


class IndexDamagedError(CacheError):
    """The pack index does not match its checksum, or contradicts itself; it is rebuilt from the packs."""


@dataclass(frozen=True)
class Place:
    """Where a record is: `length` bytes from `offset` in a pack."""

    pack: str
    offset: int
    length: int


@dataclass(frozen=True)
class PackIndex:
    """Places of records, sorted by key.

    Attributes:
        packs: name -> length of the file in bytes, in the order of their numbers.
        high, low: the halves of the keys.
        offset, length: of the records, in bytes.
        number: of the pack that holds the record.
    """

    packs: dict[str, int]
    high: Numbers
    low: Numbers
    offset: Numbers
    length: Numbers
    number: npt.NDArray[np.uint32]

    @classmethod
    def empty(cls) -> PackIndex:
        """The index of a store without packs."""
        none = np.empty(0, dtype=np.uint64)
        return cls({}, none, none, none, none, np.empty(0, dtype=np.uint32))

    @classmethod
    def of(cls, packs: dict[str, int], places: Sequence[tuple[str, Place]]) -> PackIndex:
        """The index of these (key, place) pairs; of several places of one key the first counts."""
        numbers = {name: number for number, name in enumerate(packs)}
        high, low = split_keys([key for key, _ in places])
        columns = [
            np.array([place.offset for _, place in places], dtype=np.uint64),
            np.array([place.length for _, place in places], dtype=np.uint64),
        ]
        number = np.array([numbers[place.pack] for _, place in places], dtype=np.uint32)
        return cls(dict(packs), high, low, columns[0], columns[1], number)._sorted()

    def _sorted(self) -> PackIndex:
        order = np.lexsort((self.low, self.high))  # stable: the first of equal keys stays first
        high, low = self.high[order], self.low[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        return self.select(order[first])

    def select(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> PackIndex:
        """Only these rows; all packs stay listed."""
        return PackIndex(
            self.packs, self.high[rows], self.low[rows], self.offset[rows], self.length[rows], self.number[rows]
        )

    def __len__(self) -> int:
        return len(self.high)

    def find(self, key: str) -> Place | None:
        """Where the record of a key is."""
        number = int(key, 16)
        high, low = np.uint64(number >> 64), np.uint64(number & _LOW)
        row = int(self.high.searchsorted(high))
        while row < len(self.high) and self.high[row] == high:  # keys that share a first half stand side by side
            if self.low[row] == low:
                return self.place(row)
            row += 1
        return None

    def place(self, row: int) -> Place:
        """Where the record of a row is."""
        name = self._names[int(self.number[row])]
        return Place(name, int(self.offset[row]), int(self.length[row]))

    @cached_property
    def _names(self) -> list[str]:
        return list(self.packs)

    def rows(self, keys: Sequence[str]) -> npt.NDArray[np.intp]:
        """The row of each key, -1 where the index does not have it."""
        high, low = split_keys(keys)
        rows = np.searchsorted(self.high, high)
        if not len(self):
            return np.full(len(keys), -1, dtype=np.intp)
        for _ in range(len(self)):  # keys that share a first half stand side by side
            inside = np.minimum(rows, len(self) - 1)
            further = (rows < len(self)) & (self.high[inside] == high) & (self.low[inside] < low)
            if not further.any():
                break
            rows = rows + further
        inside = np.minimum(rows, len(self) - 1)
        found = (rows < len(self)) & (self.high[inside] == high) & (self.low[inside] == low)
        return np.where(found, rows, -1)

    def keys(self) -> Iterator[str]:
        """All keys, ascending."""
        for high, low in zip(self.high.tolist(), self.low.tolist(), strict=True):
            yield f"{high:016x}{low:016x}"

    def with_packs(self, new: Mapping[str, int], places: Sequence[tuple[str, Place]]) -> PackIndex:
        """With more packs (name -> length), whose records take the place of those with the same keys."""
        packs = {**self.packs, **new}
        added = PackIndex.of(packs, places)
        return PackIndex(
            packs,
            *(
                np.concatenate([getattr(added, column), getattr(self, column)])
                for column in ("high", "low", "offset", "length", "number")
            ),
        )._sorted()

    def without_packs(self, names: set[str]) -> PackIndex:
        """Without some packs and their records."""
        kept = {name: length for name, length in self.packs.items() if name not in names}
        new_numbers = {name: number for number, name in enumerate(kept)}
        renumbered = np.full(max(len(self.packs), 1), -1, dtype=np.int64)
        for number, name in enumerate(self.packs):
            if name in kept:
                renumbered[number] = new_numbers[name]
        selected = self.select(renumbered[self.number] >= 0)
        return PackIndex(
            kept,
            selected.high,
            selected.low,
            selected.offset,
            selected.length,
            renumbered[selected.number].astype(np.uint32),
        )

    def without_rows(self, rows: npt.NDArray[np.intp]) -> PackIndex:
        """Without some records; their packs stay listed."""
        kept = np.ones(len(self), dtype=bool)
        kept[rows] = False
        return self.select(kept)

    @property
    def file_bytes(self) -> int:
        """About how long the index is as a file."""
        return _HEAD.size + _ROW_BYTES * len(self)

    def to_bytes(self) -> bytes:
        """The index as a file."""
        names = json.dumps(self.packs, separators=(",", ":")).encode("ascii")
        names += b" " * (-len(names) % 8)
        body = b"".join(
            [
                _HEAD.pack(MAGIC, 0, len(self.packs), len(self), len(names))[16:],
                names,
                *(column.astype("<u8").tobytes() for column in (self.high, self.low, self.offset, self.length)),
                self.number.astype("<u4").tobytes(),
            ]
        )
        return MAGIC + xxh3_64_intdigest(body).to_bytes(8, "little") + body

    @classmethod
    def from_bytes(cls, content: bytes) -> PackIndex:
        """Read an index; raises IndexDamagedError unless every byte of it is as it was written."""
        if len(content) < _HEAD.size or not content.startswith(MAGIC):
            raise IndexDamagedError("the pack index does not begin as one")
        _, checksum, pack_count, count, names_length = _HEAD.unpack_from(content)
        hasher = xxh3_64(memoryview(content)[16:])
        if hasher.intdigest() != checksum:
            raise IndexDamagedError("the pack index does not match its checksum")
        if len(content) != _HEAD.size + names_length + count * _ROW_BYTES:
            raise IndexDamagedError("the pack index has another length than it promises")
        try:
            packs = json.loads(content[_HEAD.size : _HEAD.size + names_length])
            sane = isinstance(packs, dict) and all(type(length) is int and length >= 0 for length in packs.values())
        except ValueError as error:
            raise IndexDamagedError(f"the pack index's list of packs cannot be read ({error})") from error
        start = _HEAD.size + names_length
        columns = [
            np.frombuffer(content, dtype="<u8", count=count, offset=start + part * 8 * count).astype(np.uint64)
            for part in range(4)
        ]
        number = np.frombuffer(content, dtype="<u4", count=count, offset=start + 32 * count).astype(np.uint32)
        if not sane or len(packs) != pack_count or (count and int(number.max()) >= pack_count):
            raise IndexDamagedError("the pack index names packs that it does not list")
        return cls(packs, columns[0], columns[1], columns[2], columns[3], number)


def split_keys(keys: Sequence[str]) -> tuple[Numbers, Numbers]:
    """The halves of keys (32 hex digits each) as numbers."""
    halves = np.frombuffer(bytes.fromhex("".join(keys)), dtype=">u8").reshape(-1, 2)
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)
