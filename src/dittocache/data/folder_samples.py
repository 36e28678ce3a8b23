"""The samples of a folder as a sequence: each is made when it is asked for, from the table of the folder's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from dittocache.data.buckets import bucket_size
from dittocache.data.digests import DIGEST_BYTES
from dittocache.data.file_table import FileTable
from dittocache.data.folder_layout import ABSENT, FolderLayout
from dittocache.data.sample import Sample

Prints = npt.NDArray[np.uint8]


class FolderSamples(Sequence[Sample]):
    """Samples in the order of their names.

    Attributes:
        table: the files, of which sizes and captions are read.
        layout: which file is whose.
        resolution, size_multiple: what a picture's size and these two give is its bucket.
        memory: folder of what is remembered from one load to the next; None where nothing is.
        notes: what the user should know besides.
    """

    def __init__(
        self, table: FileTable, layout: FolderLayout, resolution: int, size_multiple: int, memory: Path | None
    ) -> None:
        self.table = table
        self.layout = layout
        self.resolution = resolution
        self.size_multiple = size_multiple
        self.memory = memory
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.layout.names)

    @overload
    def __getitem__(self, number: int) -> Sample: ...

    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...

    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self._sample(one) for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"there are {len(self)} samples; found number {number}")
        return self._sample(number % len(self))

    def __iter__(self) -> Iterator[Sample]:
        return (self._sample(number) for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _sample(self, number: int) -> Sample:
        table, layout = self.table, self.layout
        target, mask = int(layout.targets[number]), int(layout.masks[number])
        return Sample(
            name=layout.names[number],
            target=table.path(target),
            controls=tuple(table.path(row) for row in layout.controls_of(number)),
            prompt=table.text(int(layout.captions[number])),
            size=bucket_size(*table.size(target), self.resolution, self.size_multiple),
            mask=None if mask == ABSENT else table.path(mask),
        )

    def read_digests(self) -> None:
        """Read the digests of all files that are not known yet, several at once."""
        layout = self.layout
        self.table.read_digests(
            np.concatenate([layout.targets, layout.controls, layout.masks[layout.masks != ABSENT], layout.captions])
        )

    def prints(self) -> Prints:
        """For each sample a row of bytes: the same for the same contents and sizes of files in the same roles.

        Target and caption `(digest, size)`, number of controls, the only control or a digest of several, and the mask.
        """
        table, layout = self.table, self.layout
        counts = np.diff(layout.control_starts)
        facts = np.concatenate([table.digests, table.sizes.view(np.uint8).reshape(-1, 8)], axis=1)  # (files, 24)
        width = facts.shape[1]
        control = np.zeros((len(self), width), np.uint8)
        single = counts == 1
        control[single] = facts[layout.controls[layout.control_starts[:-1][single]]]
        for number in np.flatnonzero(counts > 1).tolist():
            together = facts[layout.controls_of(number)].tobytes()
            control[number, :DIGEST_BYTES] = np.frombuffer(blake3(together).digest(length=DIGEST_BYTES), np.uint8)
        masked = layout.masks != ABSENT
        mask = np.where(masked[:, None], facts[layout.masks], np.uint8(0))
        return np.concatenate(
            [
                facts[layout.targets],
                table.digests[layout.captions],
                counts.astype(np.int64)[:, None].view(np.uint8),
                control,
                masked[:, None].view(np.uint8),
                mask,
            ],
            axis=1,
        )
