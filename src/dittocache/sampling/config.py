"""Settings of the `generate` section."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dittocache.settings import Settings


class GenerateConfig(Settings):
    """How pictures are made from a model, with or without a LoRA and the caches."""

    prompt: str | None = None
    """What to do with the picture; the data set's captions are used when left out."""

    image: list[Path] = Field(default_factory=list)
    """Reference pictures; the data set's controls are used when left out."""

    lora: Path | None = None
    """Folder of the LoRA to make them with, such as `runs/NAME/lora`; the run's own when left out."""

    side_by_side: bool = True
    """Where caches are set: make pictures without them too, to show what they change. Else only with all of them."""

    width: int | None = Field(default=None, ge=1)
    """Width of the pictures in pixels, a multiple of 16, given with `height`; else the last reference's ratio at the
    area of `data.resolution` squared, a square where there is none."""

    height: int | None = Field(default=None, ge=1)
    """Height of the pictures in pixels, a multiple of 16, given with `width`."""

    num_inference_steps: int | None = Field(default=None, ge=1)
    """Denoising steps; when left out 4 for FLUX.1-schnell, 28 for all others."""

    guidance_scale: float | None = Field(default=None, ge=0)
    """Guidance that a guidance-distilled model is told; when left out 3.5 for FLUX.1-dev, 2.5 for FLUX.1-Kontext. Other
    models take `true_cfg_scale`."""

    true_cfg_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance; 1 is off (one transformer pass a step)."""

    negative_prompt: str = " "
    """Prompt of the unconditional branch where guidance is on."""

    seed: int = 0
    """Seed of the initial noise."""

    offload: Literal["auto", "none", "components", "layers"] = "auto"
    """What lies on the GPU: all (`none`), one component at a time, or one layer at a time; `auto` takes the fastest
    that the free memory allows."""

    @field_validator("image", mode="before")
    @classmethod
    def _one_picture_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Path)) else value

    @model_validator(mode="after")
    def _both_sides_or_none(self) -> GenerateConfig:
        if (self.width is None) != (self.height is None):
            given, missing = ("width", "height") if self.height is None else ("height", "width")
            raise ValueError(f"{given} is given without {missing}; give both, or leave both out")
        return self
