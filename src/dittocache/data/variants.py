"""What a set's settings make of each of its samples: sizes, mirrored twins, words around the caption."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dittocache.data.buckets import Buckets
from dittocache.data.config import SetConfig, frame_name

FLIPPED = "@flipped"


@dataclass(frozen=True)
class Wording:
    """The words around a caption.

    Attributes:
        prefix: stands before every caption. When it ends in a letter or digit, a comma and a blank come between; when
            it ends in a blank, nothing; otherwise (`photo:`) a blank.
        trigger: stands before that, with a comma and a blank between, unless the words have it already: as a whole
            word, in capitals or not.
    """

    prefix: str = ""
    trigger: str | None = None

    def prompt(self, caption: str) -> str:
        """The prompt of a caption."""
        words = f"{self.prefix}{_joint(self.prefix)}{caption}"
        if self.trigger is None or _has_word(words, self.trigger):
            return words
        return f"{self.trigger}, {words}"


@dataclass(frozen=True)
class Variant:
    """One way in which every sample of a set is trained on.

    Attributes:
        suffix: what its samples' names end in: `@768`, `@flipped`; nothing for the first.
        buckets: the sizes of its targets.
        flipped, control_resolution, cropped: as in `Sample`.
    """

    suffix: str
    buckets: Buckets
    flipped: bool
    control_resolution: int | Literal["own"] | None

    @property
    def cropped(self) -> bool:
        """As in `Sample`."""
        return not self.buckets.keep_ratio


@dataclass(frozen=True)
class Treatment:
    """Everything but its files that the samples of a set depend on.

    Attributes:
        variants: every sample is in the set once as each.
        repeats: as in `Sample`; no tensor depends on it.
        prefix: what the names of samples begin with, so that those of several sets differ.
    """

    variants: tuple[Variant, ...]
    wording: Wording = Wording()
    repeats: int = 1
    prefix: str = ""

    def names(self, names: Iterable[str]) -> list[str]:
        """The names of all samples, from those in the folder: each once for each variant."""
        suffixes = [variant.suffix for variant in self.variants]
        return [f"{self.prefix}{name}{suffix}" for name in names for suffix in suffixes]


def treatment_of(config: SetConfig, size_multiple: int, side: int, prefix: str = "") -> Treatment:
    """What the settings of a set say.

    Args:
        size_multiple: the step of buckets where the settings name none, in pixels.
        side: to which controls are resized that do not say so themselves (`Sizes.resolution`), in pixels.
        prefix: what the names of samples begin with.
    """
    variants = []
    for number, frame in enumerate(config.frames):
        buckets = Buckets(frame, config.bucket_step or size_multiple, config.upscale, config.buckets)
        suffix = "" if number == 0 else f"@{frame_name(frame)}"
        controls = _control_resolution(config, frame, side)
        variants.append(Variant(suffix, buckets, False, controls))
        if config.flip:
            variants.append(Variant(suffix + FLIPPED, buckets, True, controls))
    wording = Wording(config.caption_prefix, config.trigger_word)
    return Treatment(tuple(variants), wording, config.repeats, prefix)


def _control_resolution(config: SetConfig, frame: tuple[int, int], side: int) -> int | Literal["own"] | None:
    if not config.resize_controls:
        return "own"
    wanted = config.control_resolution or round((frame[0] * frame[1]) ** 0.5)
    return None if wanted == side else wanted


def _joint(prefix: str) -> str:
    if not prefix or prefix[-1].isspace():
        return ""
    return ", " if prefix[-1].isalnum() else " "


def _has_word(text: str, word: str) -> bool:
    """Whether `word` stands in `text` and is no part of a longer one; scripts without blanks have no such parts."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.ASCII | re.IGNORECASE) is not None
