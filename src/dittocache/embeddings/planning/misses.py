"""Which records are missing, for whom, and why: one table against the store and the previous table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from dittocache.embeddings.planning.causes import causes
from dittocache.embeddings.planning.keyindex import KeyIndex
from dittocache.embeddings.planning.keytable import Bytes, KeyTable, Numbers

NEW = "new"
ABSENT = "missing in the store, or damaged"
EXAMPLES = 3


@dataclass(frozen=True)
class Miss:
    """A record that has to be encoded, and why.

    Attributes:
        sample, artifact: the first of those that need it.
        key: under which it will be stored.
        cause: `new`, `missing in the store, or damaged`, or what changed: `caption changed`, ...
        stale: True where an earlier record was made for this sample's artifact that no longer fits.
    """

    sample: str
    artifact: str
    key: str
    cause: str
    stale: bool


@dataclass(frozen=True)
class CauseCount:
    """How many records are missing for one cause.

    Attributes:
        samples: the names of a few samples that it concerns.
    """

    cause: str
    stale: bool
    records: int
    samples: tuple[str, ...]


class Misses(Sequence[Miss]):
    """Every missing record once, in the order of the samples; each `Miss` is made when it is asked for.

    Args:
        positions: of the missing keys in the table, ascending.
        reasons: for each the number of its entry in `words`, which are (cause, stale).
    """

    def __init__(
        self, table: KeyTable, positions: Numbers, reasons: Numbers, words: Sequence[tuple[str, bool]]
    ) -> None:
        self._table = table
        self._positions = positions
        self._reasons = reasons
        self._words = words

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, number: int) -> Miss: ...

    @overload
    def __getitem__(self, number: slice) -> list[Miss]: ...

    def __getitem__(self, number: int | slice) -> Miss | list[Miss]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        position = int(self._positions[number])
        row = int(self._table.sample_of_key[position])
        shape = self._table.shapes[self._table.shape_of[row]]
        return Miss(
            self._table.names[row],
            shape.artifacts[position - int(self._table.key_starts[row])],
            self._table.keys[position].tobytes().hex(),
            *self._words[self._reasons[number]],
        )

    def __iter__(self) -> Iterator[Miss]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def by_row(self) -> Iterator[tuple[int, list[int]]]:
        """The samples that miss a record, by their numbers in the table, each with the numbers of those artifacts."""
        rows = self._table.sample_of_key[self._positions]
        artifacts = self._positions - self._table.key_starts[rows]
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        for row, numbers in zip(rows[starts].tolist(), np.split(artifacts, starts[1:]), strict=False):
            yield row, numbers.tolist()

    @property
    def stale(self) -> list[Miss]:
        """Those for which an earlier record exists that no longer fits."""
        return [self[number] for number in np.flatnonzero(self._is_stale[self._reasons]).tolist()]

    @property
    def stale_count(self) -> int:
        """How many those are."""
        return int(self._is_stale[self._reasons].sum())

    @cached_property
    def by_cause(self) -> list[CauseCount]:
        """Counts by cause, the most frequent first, each with a few samples."""
        found: Counter[int] = Counter(self._reasons.tolist())
        return [
            CauseCount(*self._words[reason], records, self._examples(reason)) for reason, records in found.most_common()
        ]

    @cached_property
    def _is_stale(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.array([stale for _, stale in self._words], np.bool_)

    def _examples(self, reason: int) -> tuple[str, ...]:
        positions = self._positions[self._reasons == reason]
        rows = dict.fromkeys(self._table.sample_of_key[positions[: EXAMPLES * 16]].tolist())
        return tuple(self._table.names[row] for row in rows)[:EXAMPLES]


def find_misses(table: KeyTable, index: KeyIndex, lengths: Numbers, previous: KeyTable) -> Misses:
    """The records of `table` that the store does not have.

    Args:
        index: the distinct keys of `table`.
        lengths: of each distinct key's record, -1 where there is none.
        previous: the table of an earlier run; empty where there was none.
    """
    positions = np.sort(index.first[lengths < 0])
    reasons = _Reasons(table, previous)
    return Misses(table, positions, reasons.of(positions), list(reasons.words))


class _Reasons:
    """Why keys are missing, as numbers of words; equal changes of different samples are put into words once."""

    def __init__(self, table: KeyTable, previous: KeyTable) -> None:
        self._table = table
        self._previous = previous
        self.words: dict[tuple[str, bool], int] = {(NEW, False): 0, (ABSENT, False): 1}
        self._known: dict[tuple[object, ...], int] = {}

    def of(self, positions: Numbers) -> Numbers:
        rows = self._table.sample_of_key[positions]
        if not len(positions) or not self._previous.names:
            return np.zeros(len(positions), np.int64)
        earlier = [self._previous.row_of.get(self._table.names[row], -1) for row in rows.tolist()]
        artifacts = (positions - self._table.key_starts[rows]).tolist()
        found = [
            0 if before < 0 else self._reason(row, artifact, before)
            for row, artifact, before in zip(rows.tolist(), artifacts, earlier, strict=True)
        ]
        return np.array(found, np.int64)

    def _reason(self, row: int, artifact: int, before: int) -> int:
        shape = int(self._table.shape_of[row])
        shape_before = int(self._previous.shape_of[before])
        name = self._table.shapes[shape].artifacts[artifact]
        names_before = self._previous.shapes[shape_before].artifacts
        if name not in names_before:
            return 0
        artifact_before = names_before.index(name)
        key = self._table.keys[self._table.key_starts[row] + artifact]
        if np.array_equal(key, self._previous.keys[self._previous.key_starts[before] + artifact_before]):
            return 1
        known = (shape, artifact, shape_before, *self._alike(row, before))
        if known not in self._known:
            old = self._previous.recipe(before, artifact_before) or {}
            new = self._table.recipe(row, artifact) or {}
            words = (", ".join(causes(old, new)), True)
            self._known[known] = self.words.setdefault(words, len(self.words))
        return self._known[known]

    def _alike(self, row: int, before: int) -> tuple[int, ...]:
        """Which of the contents then and now are equal: contents numbered in the order in which they first occur."""
        then = _row_contents(self._previous, before)
        numbers: dict[bytes, int] = {}
        return tuple(
            numbers.setdefault(one.tobytes(), len(numbers)) for one in (*then, *_row_contents(self._table, row))
        )


def _row_contents(table: KeyTable, row: int) -> Bytes:
    return table.contents[table.content_starts[row] : table.content_starts[row + 1]]
