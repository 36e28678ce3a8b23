"""Settings of the `calibrate` and `tune` sections."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from dittocache.quality.tuning.target import Target
from dittocache.settings import Settings


class CalibrateConfig(Settings):
    """How the distance gate's polynomial is fitted to the model."""

    samples: int = Field(default=6, ge=1)
    """Pictures that are made to fit the polynomial."""

    held_out_samples: int = Field(default=3, ge=1)
    """Further pictures that only check it."""

    degree: int = Field(default=4, ge=1, le=8)
    """Degree of the polynomial; it goes through the origin."""


class TuneConfig(Settings):
    """What the step cache is tuned for, and on how much."""

    target: str = "psnr>=35"
    """What pictures must keep to, beside the ones without a cache: `psnr>=35` (dB), `ssim>=0.97`, `flip<=0.05`; or
    `speedup>=2`, transformer passes without a cache over passes with it, at the best quality."""

    promise: Literal["each", "mean"] = "each"
    """What the target holds for: `each` picture (19 of 20 that were never seen), or the `mean` over pictures."""

    samples: int = Field(default=8, ge=2)
    """Pictures that settings are tried on."""

    held_out_samples: int = Field(default=8, ge=2)
    """Pictures of other prompts that the chosen setting is verified on."""

    lpips_weights: Path | None = None
    """File of torchvision's AlexNet weights: LPIPS is measured too (extra `lpips`)."""

    @field_validator("target")
    @classmethod
    def _target_can_be_read(cls, value: str) -> str:
        return str(Target.parse(value))
