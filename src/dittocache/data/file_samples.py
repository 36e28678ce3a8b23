"""The samples of a set as a sequence: each is made when it is asked for, from the table of the set's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from dittocache.data.digests import DIGEST_BYTES, text_digest
from dittocache.data.file_table import FileTable
from dittocache.data.layout import ABSENT, Layout
from dittocache.data.sample import Sample
from dittocache.data.variants import Treatment

Prints = npt.NDArray[np.uint8]


class FileSamples(Sequence[Sample]):
    """The samples of a layout, one after another, each once for each variant of the treatment.

    Attributes:
        table: the files, of which sizes and captions are read.
        layout: which file is whose.
        treatment: everything else that samples depend on.
        place: tells this set from all others that may be remembered beside it; the same in the next load.
        memory: folder of what is remembered from one load to the next; None where nothing is.
        notes: what the user should know besides.
    """

    def __init__(
        self, table: FileTable, layout: Layout, treatment: Treatment, place: str = "", memory: Path | None = None
    ) -> None:
        self.table = table
        self.layout = layout
        self.treatment = treatment
        self.place = place
        self.memory = memory
        self.notes: list[str] = []

    @cached_property
    def names(self) -> Sequence[str]:
        """The names of all samples, in order."""
        return self.treatment.names(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names) * len(self.treatment.variants)

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
        table, layout, treatment = self.table, self.layout, self.treatment
        base, way = divmod(number, len(treatment.variants))
        variant = treatment.variants[way]
        target, mask = int(layout.targets[base]), int(layout.masks[base])
        return Sample(
            name=self.names[number],
            target=table.path(target),
            controls=tuple(table.path(row) for row in layout.controls_of(base)),
            prompt=treatment.wording.prompt(self._caption(base)),
            size=variant.buckets.size_of(*table.size(target)),
            mask=None if mask == ABSENT else table.path(mask),
            flipped=variant.flipped,
            cropped=variant.cropped,
            control_resolution=variant.control_resolution,
            repeats=treatment.repeats,
        )

    def _caption(self, base: int) -> str:
        prompts = self.layout.prompts
        return self.table.text(int(self.layout.captions[base])) if prompts is None else prompts[base]

    def read_digests(self) -> None:
        """Read the digests of all files that are not known yet, several at once."""
        captions = self.layout.captions
        self.table.read_digests(np.concatenate([self.layout.pictures, captions[captions != ABSENT]]))

    def prints(self) -> Prints:
        """For each sample a row of bytes: the same for the same contents and sizes of files in the same roles.

        Target and caption `(digest, size)`, number of controls, the only control or a digest of several, and the mask.
        What the treatment adds is not in them.
        """
        table, layout = self.table, self.layout
        counts = np.diff(layout.control_starts)
        facts = np.concatenate([table.digests, table.sizes.view(np.uint8).reshape(-1, 8)], axis=1)  # (files, 24)
        width = facts.shape[1]
        control = np.zeros((len(layout.names), width), np.uint8)
        single = counts == 1
        control[single] = facts[layout.controls[layout.control_starts[:-1][single]]]
        for number in np.flatnonzero(counts > 1).tolist():
            together = facts[layout.controls_of(number)].tobytes()
            control[number, :DIGEST_BYTES] = np.frombuffer(blake3(together).digest(length=DIGEST_BYTES), np.uint8)
        masked = layout.masks != ABSENT
        mask = np.where(masked[:, None], facts[layout.masks], np.uint8(0))
        files = np.concatenate(
            [
                facts[layout.targets],
                self._caption_digests(),
                counts.astype(np.int64)[:, None].view(np.uint8),
                control,
                masked[:, None].view(np.uint8),
                mask,
            ],
            axis=1,
        )
        return np.repeat(files, len(self.treatment.variants), axis=0)

    def _caption_digests(self) -> Prints:
        if self.layout.prompts is None:
            return self.table.digests[self.layout.captions]
        digests = bytes.fromhex("".join(map(text_digest, self.layout.prompts)))
        return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)
