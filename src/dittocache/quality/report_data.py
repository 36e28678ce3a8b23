"""What a report says, as plain data: filled by jobs, laid out by `report.py`.

Every section of a `Report` may be left out; what is there is shown. Pictures are given at full size, and
every number that can be computed from them (PSNR, SSIM, gains, the worst case) is a property here rather
than a field, so that a figure and the number beside it cannot disagree.

    Report
    +-- machine        Machine
    +-- samples        SamplesSection        SamplePair...
    +-- cached         CachedSection         CachedArtifact...
    +-- training_speed TrainingSpeedSection  TrainingSpeed (live, cached)
    +-- loss           LossSection
    +-- before_after   BeforeAfterSection    HeldOutEdit...
    +-- caches         CachesSection         ComparedEdit... -> Variant... -> SkipPattern...

Units: bytes, seconds, decibels. All collections are tuples in the order in which they are shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Literal

from PIL import Image

from dittocache.quality.metrics import capped, psnr, ssim

StepMark = Literal["computed", "refreshed", "skipped"]
"""What a denoising step did: ran the transformer blocks; ran them and computed the reference keys and values
(anew, where a cache keeps them); or reused the last residual without running them."""

Role = Literal["uncached", "cached", "fewer_steps"]
"""Uncached is what the others are held against; fewer_steps is plain sampling at about the cost of a cache."""


@dataclass(frozen=True)
class Machine:
    """What a run was measured on; made by `machine.describe_machine()`. Memory in bytes, None where unknown."""

    cpu: str
    cores: int
    memory_bytes: int | None
    system: str
    accelerators: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SamplePair:
    """One training sample: what the edit starts from, the target, and the prompt. Text-to-image has no source."""

    caption: str
    target: Image.Image
    source: Image.Image | None = None


@dataclass(frozen=True)
class SamplesSection:
    """Some of the training set; `total` is how many samples it has."""

    pairs: tuple[SamplePair, ...]
    total: int | None = None
    note: str = ""


@dataclass(frozen=True)
class CachedArtifact:
    """One kind of cached tensor (`image_latents`, `prompt_embeds`, ...).

    Attributes:
        records: distinct records that the run uses; the sum of `encoded` and `reused`.
        stored_bytes: what those records take on disk.
        seconds: encoding time; None where it was not measured for this artifact alone.
    """

    name: str
    encoder: str
    encoded: int
    reused: int
    stored_bytes: int
    seconds: float | None = None

    @property
    def records(self) -> int:
        return self.encoded + self.reused


@dataclass(frozen=True)
class CachedSection:
    """What the embedding cache holds for the run. `seconds` is the wall time of the caching stages together."""

    artifacts: tuple[CachedArtifact, ...]
    seconds: float | None = None
    note: str = ""

    @property
    def encoded(self) -> int:
        return sum(artifact.encoded for artifact in self.artifacts)

    @property
    def reused(self) -> int:
        return sum(artifact.reused for artifact in self.artifacts)

    @property
    def stored_bytes(self) -> int:
        return sum(artifact.stored_bytes for artifact in self.artifacts)


@dataclass(frozen=True)
class LossSection:
    """Training loss: `steps` and `losses` of equal length."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    note: str = ""


@dataclass(frozen=True)
class HeldOutEdit:
    """A held-out picture edited without and with the LoRA from the same noise, and the right outcome."""

    caption: str
    source: Image.Image
    base: Image.Image
    lora: Image.Image
    target: Image.Image

    @cached_property
    def base_psnr(self) -> float:
        """PSNR in dB of the base model's edit against the target."""
        return psnr(self.base, self.target)

    @cached_property
    def lora_psnr(self) -> float:
        """PSNR in dB of the edit with LoRA against the target."""
        return psnr(self.lora, self.target)

    @property
    def gain(self) -> float:
        """What the LoRA adds, in dB; infinite values are capped."""
        return capped(self.lora_psnr) - capped(self.base_psnr)


@dataclass(frozen=True)
class BeforeAfterSection:
    """Held-out edits before and after training. All are counted; the page shows `shown` of them and the worst."""

    edits: tuple[HeldOutEdit, ...]
    shown: int = 4
    note: str = ""

    def __post_init__(self) -> None:
        if not self.edits:
            raise ValueError(
                "a before-and-after section needs at least one held-out edit; leave the section out instead"
            )

    @property
    def base_psnr(self) -> float:
        """Mean over the edits, in dB."""
        return _mean([capped(edit.base_psnr) for edit in self.edits])

    @property
    def lora_psnr(self) -> float:
        """Mean over the edits, in dB."""
        return _mean([capped(edit.lora_psnr) for edit in self.edits])

    @property
    def mean_gain(self) -> float:
        """Mean gain in dB."""
        return _mean([edit.gain for edit in self.edits])

    @property
    def smallest_gain(self) -> float:
        return min(edit.gain for edit in self.edits)

    @property
    def largest_gain(self) -> float:
        return max(edit.gain for edit in self.edits)

    @property
    def improved(self) -> int:
        """Edits that came nearer to their target."""
        return sum(edit.gain > 0 for edit in self.edits)

    @property
    def worst(self) -> HeldOutEdit:
        """The edit with LoRA that is farthest from its target."""
        return min(self.edits, key=lambda edit: edit.lora_psnr)


@dataclass(frozen=True)
class SkipPattern:
    """What each denoising step did in one branch (`cond`, `uncond`) of a request."""

    branch: str
    marks: tuple[StepMark, ...]

    @property
    def computed(self) -> int:
        """Steps that ran the transformer blocks, refreshing or not."""
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
    """

    label: str
    role: Role
    picture: Image.Image
    seconds: float
    patterns: tuple[SkipPattern, ...] = ()
    settings: str = ""
    bytes_held: int | None = None


@dataclass(frozen=True)
class ComparedEdit:
    """The same edit, same noise, made in several ways; exactly one variant has the role `uncached`."""

    caption: str
    source: Image.Image
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
        uncached_seconds = _mean([edit.uncached.seconds for edit in self.edits])
        summaries = []
        for index, first in enumerate(self.edits[0].variants):
            variants = [edit.variants[index] for edit in self.edits]
            seconds = _mean([variant.seconds for variant in variants])
            psnrs = [edit.psnrs[index] for edit in self.edits]
            ssims = [edit.ssims[index] for edit in self.edits]
            held = [variant.bytes_held for variant in variants if variant.bytes_held is not None]
            summaries.append(
                VariantSummary(
                    label=first.label,
                    role=first.role,
                    settings=first.settings,
                    seconds=seconds,
                    speedup=uncached_seconds / seconds if seconds > 0 else math.nan,
                    computed=_mean([_mean([float(p.computed) for p in v.patterns]) for v in variants]),
                    skipped=_mean([_mean([float(p.skipped) for p in v.patterns]) for v in variants]),
                    mean_psnr=math.inf if min(psnrs) == math.inf else _mean([capped(value) for value in psnrs]),
                    worst_psnr=min(psnrs),
                    mean_ssim=_mean(ssims),
                    worst_ssim=min(ssims),
                    bytes_held=max(held) if held else None,
                )
            )
        return tuple(summaries)

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


@dataclass(frozen=True)
class TrainingSpeed:
    """Training one way (`cached`, `live`): seconds a step, and peak memory in bytes where it was measured."""

    label: str
    seconds_per_step: float
    steps: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class TrainingSpeedSection:
    """Training on cached embeddings against encoding every sample in every step."""

    live: TrainingSpeed
    cached: TrainingSpeed
    note: str = ""

    @property
    def speedup(self) -> float:
        return self.live.seconds_per_step / self.cached.seconds_per_step


@dataclass(frozen=True)
class Report:
    """Everything one report page says.

    Attributes:
        verdict: one sentence with the key numbers; composed from the sections when left out.
        command: what made the run, shown so that a reader can repeat it.
    """

    title: str
    date: datetime
    verdict: str | None = None
    command: str = ""
    machine: Machine | None = None
    samples: SamplesSection | None = None
    cached: CachedSection | None = None
    training_speed: TrainingSpeedSection | None = None
    loss: LossSection | None = None
    before_after: BeforeAfterSection | None = None
    caches: CachesSection | None = None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
