"""One training sample as files and words, before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """A target picture, what it is made from, and the words that ask for it.

    Attributes:
        name: unique within the data set, and stable between runs (the path without its ending, relative to the set).
        target: the picture that the model learns to produce.
        controls: the reference (control) pictures in order; empty for text-to-image.
        prompt: the caption.
        size: (width, height) in pixels of the target after resizing: its bucket.
        mask: an optional picture that weighs the loss.
    """

    name: str
    target: Path
    controls: tuple[Path, ...]
    prompt: str
    size: tuple[int, int]
    mask: Path | None = None
