"""One training sample as files and words, before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


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
        flipped: target, controls and mask are mirrored left-right after reading.
        cropped: target and mask are scaled to cover `size` and cut at the centre, instead of being stretched to it.
        control_resolution: side in pixels of the square whose area its controls are resized to for the VAE; None takes
            the run's resolution, "own" keeps each control's own size, rounded to the family's multiple.
        repeats: how often it is trained on in an epoch; no artifact depends on it.
    """

    name: str
    target: Path
    controls: tuple[Path, ...]
    prompt: str
    size: tuple[int, int]
    mask: Path | None = None
    flipped: bool = False
    cropped: bool = False
    control_resolution: int | Literal["own"] | None = None
    repeats: int = 1
