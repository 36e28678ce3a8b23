"""Several data sets as one sequence of samples."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import overload

from dittocache.data.file_samples import FileSamples
from dittocache.data.sample import Sample


class SampleSets(Sequence[Sample]):
    """The samples of several sets, one set after another.

    Attributes:
        parts: the sets.
    """

    def __init__(self, parts: Sequence[FileSamples]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(map(len, self.parts)))

    @property
    def notes(self) -> list[str]:
        """What the user should know besides."""
        return [note for part in self.parts for note in part.notes]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, number: int) -> Sample: ...

    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...

    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"there are {len(self)} samples; found number {number}")
        number %= len(self)
        part = bisect_right(self._ends, number)
        return self.parts[part][number - self._ends[part] + len(self.parts[part])]

    def __iter__(self) -> Iterator[Sample]:
        return chain.from_iterable(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def set_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each set, unlike all others: as much of the end of its path as it takes.

    A set that is there several times has a number from its second time on: `cats`, `cats-2`.
    """
    whole = [path.absolute().with_suffix("") if path.is_file() else path.absolute() for path in paths]
    tails = {path: _tail(path, set(whole) - {path}) for path in whole}
    times: Counter[str] = Counter()
    names = []
    for path in whole:
        times[tails[path]] += 1
        count = times[tails[path]]
        names.append(tails[path] if count == 1 else f"{tails[path]}-{count}")
    return names


def _tail(path: Path, others: set[Path]) -> str:
    parts = path.parts
    for count in range(1, len(parts)):
        if all(other.parts[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return "/".join(parts[1:])


def name_problems(parts: Sequence[FileSamples]) -> list[str]:
    """Names that several samples have."""
    names = [name for part in parts for name in part.names]
    if len(set(names)) == len(names):
        return []
    twice = [name for name, count in Counter(names).items() if count > 1]
    return [f"several samples are called {name!r}; rename the files of all but one" for name in twice]
