"""One picture of a run: what to make, in which way, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittocache.families.stock_calls import ControlResolution
from dittocache.jobs.inputs import RunInputs
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.config import GenerateConfig
from dittocache.sampling.generate import Picture, generate
from dittocache.teacache.config import TeaCacheConfig


@dataclass(frozen=True)
class Edit:
    """What to make: reference pictures, words, and the right outcome where it is known.

    Attributes:
        size: (width, height) in pixels; None: as the settings say, else the last reference's ratio.
        control_resolution: to what size the references are brought, as in training.
    """

    name: str
    images: tuple[Path, ...]
    prompt: str
    target: Path | None = None
    size: tuple[int, int] | None = None
    control_resolution: ControlResolution = None


@dataclass(frozen=True)
class Way:
    """One way of making an edit."""

    label: str
    role: str
    settings: str = ""
    steps: int | None = None
    teacache: TeaCacheConfig | None = None
    reference_kv: ReferenceKVConfig | None = None


PLAIN = Way("plain", "uncached")


def make_picture(
    inputs: RunInputs,
    pipe: Any,
    edit: Edit,
    number: int,
    way: Way = PLAIN,
    prompt_embeds: Mapping[str, torch.Tensor | None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Picture:
    """One edit in one way; its noise depends on its number alone. `prompt_embeds`, `on_step` as for `generate`."""
    settings: GenerateConfig = inputs.config.generate
    update: dict[str, Any] = {"seed": settings.seed + number}
    if way.steps is not None:
        update["num_inference_steps"] = way.steps
    if edit.size is not None and settings.width is None:
        update["width"], update["height"] = edit.size
    return generate(
        pipe,
        edit.images,
        edit.prompt,
        settings.model_copy(update=update),
        inputs.sizes,
        way.teacache,
        way.reference_kv,
        prompt_embeds=prompt_embeds,
        control_resolution=edit.control_resolution,
        on_step=on_step,
    )
