"""Settings of the `generate` section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from dittocache.settings import Settings


class GenerateConfig(Settings):
    """How pictures are made from a model, with or without a LoRA and the caches."""

    prompt: str | None = None
    """What to do with the picture; the data set's captions are used when left out."""

    image: list[Path] = Field(default_factory=list)
    """Reference pictures; the data set's controls are used when left out."""

    num_inference_steps: int = Field(default=28, ge=1)
    """Denoising steps."""

    true_cfg_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance; 1 is off (one transformer pass a step)."""

    negative_prompt: str = " "
    """Prompt of the unconditional branch where guidance is on."""

    seed: int = 0
    """Seed of the initial noise."""

    @field_validator("image", mode="before")
    @classmethod
    def _one_picture_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Path)) else value
