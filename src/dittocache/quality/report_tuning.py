"""What a report says of a tuning: every setting that was measured, and those that nothing beats."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dittocache.quality.tuning.pareto import pareto


@dataclass(frozen=True)
class TuningPoint:
    """One setting over all tuning pictures. PSNR in dB; each metric with the picture where it is worst.

    Attributes:
        label: the setting in words.
        speedup, wall: by transformer passes, and by wall time of the whole call.
        plain: fewer steps without any cache.
        chosen: what the tuning recommends.
    """

    label: str
    speedup: float
    wall: float
    psnr: float
    psnr_worst: float
    ssim: float
    ssim_worst: float
    flip: float
    flip_worst: float
    plain: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class TuningSection:
    """All settings that were measured; `words` is what the tuning said in the end."""

    points: tuple[TuningPoint, ...]
    words: str = ""

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a tuning section needs at least one measured setting; leave the section out instead")

    @cached_property
    def front(self) -> tuple[TuningPoint, ...]:
        """The settings that no other one beats in both speed and PSNR, from slow to fast."""
        return tuple(pareto(self.points))
