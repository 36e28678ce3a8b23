"""Which of many keys is where: 700,000 keys are sorted in a tenth of a second and found without a dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dittocache.data.digests import DIGEST_BYTES
from dittocache.embeddings.planning.keytable import Bytes, Numbers, is_key


class KeyIndex:
    """The distinct keys among `keys` `(n, 16)` uint8, in ascending order."""

    def __init__(self, keys: Bytes) -> None:
        self._keys = keys

    @cached_property
    def _sorted(self) -> tuple[Numbers, npt.NDArray[np.bool_]]:
        """The order of all keys, and for each in that order whether it is the first of its equals."""
        first, second = _halves(self._keys)
        order = np.argsort(first, kind="stable")
        halves = first[order]
        if not np.array_equal(halves[1:] == halves[:-1], _same(first, second, order)):
            order = np.lexsort((second, first))  # two keys that are alike in their first half only
        leads = np.ones(len(order), np.bool_)
        leads[1:] = ~_same(first, second, order)
        return order, leads

    @cached_property
    def first(self) -> Numbers:
        """Where each distinct key stands first in `keys`."""
        order, leads = self._sorted
        return order[leads]

    @cached_property
    def distinct_of(self) -> Numbers:
        """For each of `keys` the number of its distinct key."""
        order, leads = self._sorted
        numbers = np.empty(len(order), np.int64)
        numbers[order] = np.cumsum(leads) - 1
        return numbers

    @cached_property
    def keys(self) -> Bytes:
        """The distinct keys `(m, 16)`."""
        return self._keys[self.first]

    @cached_property
    def _distinct_halves(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        first, second = _halves(self.keys)
        return first, second

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[str]:
        digits, width = self.keys.tobytes().hex(), 2 * DIGEST_BYTES
        return (digits[start : start + width] for start in range(0, len(digits), width))

    def number(self, key: bytes) -> int | None:
        """The number of a distinct key; None when it is not there."""
        first, second = self._distinct_halves
        wanted, rest = int.from_bytes(key[:8]), int.from_bytes(key[8:])
        at = int(np.searchsorted(first, np.uint64(wanted)))
        while at < len(first) and int(first[at]) == wanted:
            if int(second[at]) == rest:
                return at
            at += 1
        return None

    def position(self, key: bytes) -> int | None:
        """Where the key stands first in `keys`; None when it is not there."""
        number = self.number(key)
        return None if number is None else int(self.first[number])

    def contains(self, keys: Bytes) -> npt.NDArray[np.bool_]:
        """For each of these keys `(n, 16)` whether it is there."""
        found = np.zeros(len(keys), np.bool_)
        first, second = self._distinct_halves
        if not len(first):
            return found
        wanted, rest = _halves(keys)
        at = np.searchsorted(first, wanted)
        for _ in range(len(first)):
            inside = np.minimum(at, len(first) - 1)
            alike = (at < len(first)) & (first[inside] == wanted) & ~found
            found |= alike & (second[inside] == rest)
            if not (alike & ~found).any():
                return found
            at = at + 1
        return found


class StoredRecords(Mapping[str, int]):
    """key -> bytes of those of the keys that are stored.

    Args:
        index: the keys.
        lengths: for each distinct key its record's length in bytes, -1 where there is none.
    """

    def __init__(self, index: KeyIndex, lengths: Numbers) -> None:
        self._index = index
        self._lengths = lengths

    @cached_property
    def _count(self) -> int:
        return int((self._lengths >= 0).sum())

    @cached_property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return int(self._lengths[self._lengths >= 0].sum())

    @cached_property
    def present(self) -> npt.NDArray[np.bool_]:
        """For each of the keys that the index was made of, whether its record is there."""
        there: npt.NDArray[np.bool_] = (self._lengths >= 0)[self._index.distinct_of]
        return there

    def __getitem__(self, key: str) -> int:
        number = self._index.number(bytes.fromhex(key)) if is_key(key) else None
        if number is None or self._lengths[number] < 0:
            raise KeyError(key)
        return int(self._lengths[number])

    def __iter__(self) -> Iterator[str]:
        return (key for key, length in zip(self._index, self._lengths.tolist(), strict=True) if length >= 0)

    def __len__(self) -> int:
        return self._count


def _halves(keys: Bytes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Both halves of each key as numbers that sort as the keys do."""
    halves = np.ascontiguousarray(keys).view(">u8").astype(np.uint64).reshape(-1, 2)
    return halves[:, 0], halves[:, 1]


def _same(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64], order: Numbers) -> npt.NDArray[np.bool_]:
    """For each key of an order but the first, whether it equals the one before it."""
    ordered_first, ordered_second = first[order], second[order]
    same: npt.NDArray[np.bool_] = (ordered_first[1:] == ordered_first[:-1]) & (
        ordered_second[1:] == ordered_second[:-1]
    )
    return same
