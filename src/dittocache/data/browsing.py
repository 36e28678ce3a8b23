"""A data set as a person looks at it: every sample with its files, also those that cannot be trained on yet."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from dittocache.data.config import DataConfig
from dittocache.data.file_samples import FileSamples
from dittocache.data.layout import ABSENT
from dittocache.data.loading import read_set, treated_sets
from dittocache.data.sample_sets import name_problems
from dittocache.errors import DataError


@dataclass(frozen=True)
class Item:
    """One sample of a set, once, whatever its variants are.

    Attributes:
        name: as in `Sample`, without what variants add.
        target, controls, mask: its pictures.
        caption: its words as they are in the file or table; empty where there are none or they cannot be read.
        caption_file: where the words are, or belong; None for those of a table.
        size: (width, height) in pixels of the target; None where it cannot be read.
        buckets: (width, height) in pixels that the target is brought to, once for each resolution.
    """

    name: str
    target: Path
    controls: tuple[Path, ...]
    mask: Path | None
    caption: str
    caption_file: Path | None
    size: tuple[int, int] | None
    buckets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Browsed:
    """Everything in the data sets of a run. Items are made when they are asked for.

    Attributes:
        parts: the sets that could be read.
        caption_endings: of the caption files of each.
        problems: all that keeps them from being trained on.
        notes: what the user should know besides.
    """

    parts: list[FileSamples] = field(default_factory=list)
    caption_endings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(part.layout.names) for part in self.parts)

    def item(self, number: int) -> Item:
        """One of them, in the order of the sets and their names; raises IndexError."""
        ends = list(accumulate(len(part.layout.names) for part in self.parts))
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} samples; found number {number}")
        part = bisect_right(ends, number)
        inside = number - (ends[part - 1] if part else 0)
        return _item(self.parts[part], inside, self.caption_endings[part])

    def matching(self, words: str) -> list[int]:
        """Numbers of the items whose name or caption holds these words, in capitals or not; all for no words."""
        wanted = words.strip().casefold()
        if not wanted:
            return list(range(len(self)))
        found, offset = [], 0
        for part in self.parts:
            for number, name in enumerate(part.layout.names):
                if wanted in f"{part.treatment.prefix}{name}".casefold() or wanted in _caption(part, number).casefold():
                    found.append(offset + number)
            offset += len(part.layout.names)
        return found

    def buckets(self) -> dict[tuple[int, int], int]:
        """How many targets are brought to each size (width, height) in pixels, smallest area first."""
        counts: Counter[tuple[int, int]] = Counter()
        for part in self.parts:
            sizes, times = np.unique(part.table.sizes[part.layout.targets], axis=0, return_counts=True)
            for (width, height), count in zip(sizes.tolist(), times.tolist(), strict=True):
                for bucket in _buckets(part, (width, height)):
                    counts[bucket] += count
        return dict(sorted(counts.items(), key=lambda one: (one[0][0] * one[0][1], one[0])))


def browse(config: DataConfig, size_multiple: int, memory: Path | None) -> Browsed:
    """All samples of the data sets with everything that is wrong with them; raises nothing for what is in the files.

    Args: as for `load_samples`.
    """
    problems: list[str] = []
    parts: list[FileSamples] = []
    endings: list[str] = []
    for source, treatment in treated_sets(config, size_multiple, problems):
        try:
            parts.append(read_set(source, treatment, memory, problems))
        except DataError as error:
            problems += error.problems or [str(error)]
        else:
            endings.append(source.config.caption_extension)
    problems += name_problems(parts)
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    return Browsed(parts, endings, list(dict.fromkeys(problems)), notes)


def write_caption(file: Path, words: str) -> None:
    """Put a caption in place of what the file holds, at once: a reader sees the old words or the new ones.

    Raises DataError for empty words, or where the file cannot be written.
    """
    words = words.strip()
    if not words:
        raise DataError(f"{file}: the caption is empty; say what the picture shows")
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=".", suffix=".caption", delete=False
        ) as stream:
            temporary = Path(stream.name)
            stream.write(words + "\n")
        temporary.chmod(file.stat().st_mode if file.exists() else 0o644)
        os.replace(temporary, file)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise DataError(f"{file}: the caption cannot be written ({error.strerror or error})") from error


def _item(part: FileSamples, number: int, ending: str) -> Item:
    table, layout = part.table, part.layout
    target, mask, caption = int(layout.targets[number]), int(layout.masks[number]), int(layout.captions[number])
    size = _known_size(part, target)
    file = None
    if layout.prompts is None:
        file = table.path(caption) if caption != ABSENT else table.path(target).with_suffix(ending)
    return Item(
        name=f"{part.treatment.prefix}{layout.names[number]}",
        target=table.path(target),
        controls=tuple(table.path(row) for row in layout.controls_of(number)),
        mask=None if mask == ABSENT else table.path(mask),
        caption=_caption(part, number),
        caption_file=file,
        size=size,
        buckets=tuple(_buckets(part, size)) if size is not None else (),
    )


def _caption(part: FileSamples, number: int) -> str:
    layout = part.layout
    if layout.prompts is not None:
        return layout.prompts[number]
    row = int(layout.captions[number])
    return part.table.texts.get(row, "") if row != ABSENT else ""


def _known_size(part: FileSamples, row: int) -> tuple[int, int] | None:
    width, height = part.table.sizes[row].tolist()
    return (width, height) if width and height else None


def _buckets(part: FileSamples, size: tuple[int, int]) -> list[tuple[int, int]]:
    """One for each resolution; mirrored twins have the same."""
    if not all(size):
        return []
    variants = [variant for variant in part.treatment.variants if not variant.flipped]
    return [variant.buckets.size_of(*size) for variant in variants]
