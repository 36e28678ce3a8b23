"""What a report says of the sampling caches: the same edits made in several ways, held against plain sampling.

CachesSection -> ComparedEdit... -> Variant... -> SkipPattern...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from PIL import Image

from dittocache.quality.metrics import capped, mean, psnr, ssim
from dittocache.quality.metrics_flip import flip

StepMark = Literal["computed", "refreshed", "kept", "skipped"]
"""What a denoising step did: ran the transformer blocks; ran them and computed the reference keys and values
(anew, where a cache keeps them); ran them on kept ones; or predicted what they would say without running them."""

Role = Literal["uncached", "cached", "fewer_steps"]
"""Uncached is what the others are held against; fewer_steps is plain sampling at about the cost of a cache."""


@dataclass(frozen=True)
class SkipPattern:
    """What each denoising step did in one branch (`cond`, `uncond`) of a request."""

    branch: str
    marks: tuple[StepMark, ...]

    @property
    def computed(self) -> int:
        """Steps that ran the transformer blocks, whatever became of the references."""
        return len(self.marks) - self.skipped

    @property
    def skipped(self) -> int:
        return self.marks.count("skipped")


@dataclass(frozen=True)
class Variant:
    """One edit made one way.

    Attributes:
        label: how it was made, the same for every edit (`TeaCache`, `14 plain steps`).
        settings: what was set, in short (`rel_l1_thresh 0.2`).
        seconds: wall time of the whole request.
        patterns: one for each branch; one in all without classifier-free guidance.
        bytes_held: what the caches held at most; None where unknown or nothing is cached.
        notes: remarks of the caches: one that never triggered, settings that cannot work.
    """

    label: str
    role: Role
    picture: Image.Image
    seconds: float
    patterns: tuple[SkipPattern, ...] = ()
    settings: str = ""
    bytes_held: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparedEdit:
    """The same edit, same noise, made in several ways; exactly one variant has the role `uncached`.

    Text-to-image has no source.
    """

    caption: str
    source: Image.Image | None
    variants: tuple[Variant, ...]

    def __post_init__(self) -> None:
        found = sum(variant.role == "uncached" for variant in self.variants)
        if found != 1:
            raise ValueError(
                f"the edit {self.caption!r} has {found} variants of role 'uncached'; expected exactly one, "
                "because the others are held against it"
            )

    @property
    def uncached(self) -> Variant:
        return next(variant for variant in self.variants if variant.role == "uncached")

    @cached_property
    def psnrs(self) -> tuple[float, ...]:
        """PSNR in dB of each variant against the uncached one (infinite for itself)."""
        return tuple(psnr(variant.picture, self.uncached.picture) for variant in self.variants)

    @cached_property
    def ssims(self) -> tuple[float, ...]:
        """SSIM of each variant against the uncached one."""
        return tuple(ssim(variant.picture, self.uncached.picture) for variant in self.variants)

    @cached_property
    def flips(self) -> tuple[float, ...]:
        """FLIP of each variant beside the uncached one: 0 for equal pictures, 1 at most."""
        return tuple(flip(variant.picture, self.uncached.picture) for variant in self.variants)


@dataclass(frozen=True)
class VariantSummary:
    """One way of making edits, over all compared edits. PSNR in dB, capped in the mean."""

    label: str
    role: Role
    settings: str
    seconds: float
    speedup: float
    computed: float
    skipped: float
    mean_psnr: float
    worst_psnr: float
    mean_ssim: float
    worst_ssim: float
    mean_flip: float
    worst_flip: float
    bytes_held: int | None


@dataclass(frozen=True)
class CachesSection:
    """The same edits uncached, with each cache, with both, and with fewer plain steps.

    Every edit has the same variants in the same order. The first edit is shown in full, then the worst case.
    """

    edits: tuple[ComparedEdit, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.edits:
            raise ValueError("a caches section needs at least one compared edit; leave the section out instead")
        expected = [variant.label for variant in self.edits[0].variants]
        for edit in self.edits[1:]:
            found = [variant.label for variant in edit.variants]
            if found != expected:
                raise ValueError(
                    f"the edit {edit.caption!r} has the variants {found}; expected {expected} as in the first edit"
                )

    @cached_property
    def summaries(self) -> tuple[VariantSummary, ...]:
        """Each variant over all edits: mean seconds and steps, speed-up of the mean, mean and worst quality."""
        uncached_seconds = mean([edit.uncached.seconds for edit in self.edits])
        summaries = []
        for index, first in enumerate(self.edits[0].variants):
            variants = [edit.variants[index] for edit in self.edits]
            seconds = mean([variant.seconds for variant in variants])
            psnrs = [edit.psnrs[index] for edit in self.edits]
            ssims = [edit.ssims[index] for edit in self.edits]
            flips = [edit.flips[index] for edit in self.edits]
            held = [variant.bytes_held for variant in variants if variant.bytes_held is not None]
            summaries.append(
                VariantSummary(
                    label=first.label,
                    role=first.role,
                    settings=first.settings,
                    seconds=seconds,
                    speedup=uncached_seconds / seconds if seconds > 0 else math.nan,
                    computed=mean([mean([float(p.computed) for p in v.patterns]) for v in variants]),
                    skipped=mean([mean([float(p.skipped) for p in v.patterns]) for v in variants]),
                    mean_psnr=math.inf if min(psnrs) == math.inf else mean([capped(value) for value in psnrs]),
                    worst_psnr=min(psnrs),
                    mean_ssim=mean(ssims),
                    worst_ssim=min(ssims),
                    mean_flip=mean(flips),
                    worst_flip=max(flips),
                    bytes_held=max(held) if held else None,
                )
            )
        return tuple(summaries)

    @property
    def remarks(self) -> tuple[tuple[str, str], ...]:
        """(label, remark) of each remark of a cache, once, in the order of the variants."""
        return tuple(
            dict.fromkeys(
                (first.label, note)
                for index, first in enumerate(self.edits[0].variants)
                for edit in self.edits
                for note in edit.variants[index].notes
            )
        )

    @property
    def worst(self) -> tuple[ComparedEdit, Variant] | None:
        """The cached picture that is farthest from its uncached one; None when nothing was cached."""
        found = [
            (decibels, edit, variant)
            for edit in self.edits
            for variant, decibels in zip(edit.variants, edit.psnrs, strict=True)
            if variant.role == "cached"
        ]
        if not found:
            return None
        _, edit, variant = min(found, key=lambda entry: entry[0])
        return edit, variant
