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
    +-- caches         CachesSection         in report_caches.py
    +-- tuning         TuningSection         in report_tuning.py

Units: bytes, seconds, decibels. All collections are tuples in the order in which they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from PIL import Image

from dittocache.quality.metrics import capped, mean, psnr
from dittocache.quality.report_caches import CachesSection
from dittocache.quality.report_tuning import TuningSection


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
    """A held-out picture edited without and with the LoRA from the same noise, and the right outcome.

    Text-to-image has no source.
    """

    caption: str
    source: Image.Image | None
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
        return mean([capped(edit.base_psnr) for edit in self.edits])

    @property
    def lora_psnr(self) -> float:
        """Mean over the edits, in dB."""
        return mean([capped(edit.lora_psnr) for edit in self.edits])

    @property
    def mean_gain(self) -> float:
        """Mean gain in dB."""
        return mean([edit.gain for edit in self.edits])

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
    tuning: TuningSection | None = None
