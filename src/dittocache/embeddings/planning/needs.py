"""What each encoder has to do for each sample, made from the table of keys when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from dittocache.data.sample import Sample
from dittocache.embeddings.planning.keytable import KeyTable, Numbers, Shape, base_parts


@dataclass(frozen=True)
class Need:
    """What one sample needs of one encoder: artifact name -> key."""

    sample: Sample
    keys: Mapping[str, str]


class Needs(Sequence[Need]):
    """Every sample's need of one encoder, in order.

    Args:
        samples: those of the table, in its order.
        encoder: a component's name; None for plain facts.
    """

    def __init__(self, samples: Sequence[Sample], table: KeyTable, encoder: str | None) -> None:
        self._samples = samples
        self._table = table
        self._numbers = [
            [number for number, one in enumerate(encoders_of(shape)) if one == encoder] for shape in table.shapes
        ]

    @cached_property
    def _rows(self) -> Numbers:
        """The samples that need this encoder at all."""
        needed = np.array([bool(numbers) for numbers in self._numbers], np.bool_)
        return np.flatnonzero(needed[self._table.shape_of]) if len(needed) else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> Need: ...

    @overload
    def __getitem__(self, number: slice) -> list[Need]: ...

    def __getitem__(self, number: int | slice) -> Need | list[Need]:
        if isinstance(number, slice):
            return [self.of_row(int(row)) for row in self._rows[number]]
        return self.of_row(int(self._rows[number]))

    def __iter__(self) -> Iterator[Need]:
        return (self.of_row(row) for row in self._rows.tolist())

    def of_row(self, row: int) -> Need:
        """The need of one sample by its number in the table."""
        artifacts = self._table.shapes[self._table.shape_of[row]].artifacts
        keys = self._table.keys_of(row)
        wanted = [artifacts[number] for number in self._numbers[self._table.shape_of[row]]]
        return Need(self._samples[row], {name: keys[name] for name in wanted})

    @cached_property
    def ours(self) -> npt.NDArray[np.bool_]:
        """For each key of the table whether this encoder makes its record."""
        chosen = [
            [number in numbers for number in range(len(shape.artifacts))]
            for numbers, shape in zip(self._numbers, self._table.shapes, strict=True)
        ]
        return self._table.by_key(dict(zip(self._table.shapes, chosen, strict=True))).astype(np.bool_)

    def rows_without(self, present: npt.NDArray[np.bool_]) -> list[int]:
        """The samples of which a record of this encoder is missing, given for each key whether its record is there."""
        rows: list[int] = np.unique(self._table.sample_of_key[self.ours & ~present]).tolist()
        return rows


def encoders_of(shape: Shape) -> list[str | None]:
    """For each artifact of a shape the component that makes it."""
    return [_encoder(base) for base in shape.bases]


def _encoder(base: str | None) -> str | None:
    encoder = None if base is None else base_parts(base).get("encoder")
    return None if encoder is None else str(encoder["component"])
