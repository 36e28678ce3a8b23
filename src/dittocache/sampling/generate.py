"""One picture from a pipeline, with or without caches, and what it took."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dittocache.errors import ConfigError
from dittocache.families.base import Sizes
from dittocache.families.pictures import open_picture
from dittocache.families.stock_calls import (
    ControlResolution,
    check_references,
    is_guidance_distilled,
    output_size,
    picture_options,
    side_multiple,
    usual_guidance,
    usual_steps,
)
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.config import GenerateConfig
from dittocache.sampling.session import cached
from dittocache.sampling.trace import Trace
from dittocache.teacache.config import TeaCacheConfig


@dataclass(frozen=True)
class Picture:
    """A generated picture, the wall seconds of the pipeline's whole call, and the trace of the caches' decisions."""

    image: Image.Image
    seconds: float
    trace: Trace


def generate(
    pipe: Any,
    images: Sequence[Image.Image | Path],
    prompt: str,
    config: GenerateConfig,
    sizes: Sizes,
    teacache: TeaCacheConfig | None = None,
    reference_kv: ReferenceKVConfig | None = None,
    prompt_embeds: Mapping[str, torch.Tensor | None] | None = None,
    control_resolution: ControlResolution = None,
    on_step: Callable[[], None] | None = None,
) -> Picture:
    """Make one picture of `prompt`, from reference pictures where the pipeline takes them.

    The picture has the size that `config` says, else the last reference's ratio and `sizes.resolution` squared pixels,
    in sides that the model takes. The same seed gives the same noise with and without caches. Seconds are those of the
    pipeline's call: encoders, denoising and decoder.

    Args:
        pipe: a diffusers pipeline.
        images: reference pictures, or their files; none for text to image.
        prompt: what to do; `config.prompt` is not read here.
        config: size, steps, guidance, negative prompt and seed.
        sizes: of the result and of the references.
        teacache: settings of the step cache; None: off.
        reference_kv: settings of the reference KV cache; None: off.
        prompt_embeds: arguments of the pipeline that stand for the prompt, each with a batch axis of one; the
            pipeline then needs no text encoder where guidance is off, or the negative prompt's are among them.
        control_resolution: to what size references are brought, as in training (`Sample.control_resolution`).
        on_step: called after every denoising step.

    Raises ConfigError for references, sizes or guidance that the pipeline does not take, DataError naming a file that
    cannot be read, and what `cached` raises.
    """
    pictures = [image if isinstance(image, Image.Image) else open_picture(image) for image in images]
    check_references(pipe, len(pictures), accepted="image" in _parameters(pipe))
    size = _size(pipe, pictures, config, sizes)
    options: dict[str, Any] = {
        "prompt": prompt,
        "num_inference_steps": steps_of(pipe, config),
        **_guidance(pipe, config),
    }
    options["generator"] = torch.Generator().manual_seed(config.seed)
    if prompt_embeds is not None:
        options |= {"prompt": None, **prompt_embeds}
    if on_step is not None:
        options["callback_on_step_end"] = _after_step(on_step)
    with (
        picture_options(pipe, pictures, size, sizes, control_resolution) as sized,
        cached(pipe, teacache, reference_kv) as trace,
    ):
        began = time.perf_counter()
        image = pipe(**options, **sized).images[0]
        seconds = time.perf_counter() - began
    return Picture(image, seconds, trace)


def _after_step(on_step: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    """`on_step` as the pipelines call it: they take back the tensors that it might have changed."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return {}

    return callback


def steps_of(pipe: Any, config: GenerateConfig) -> int:
    """Denoising steps of a picture: as set, else what is usual for the model."""
    return usual_steps(pipe) if config.num_inference_steps is None else config.num_inference_steps


def _size(pipe: Any, pictures: Sequence[Image.Image], config: GenerateConfig, sizes: Sizes) -> tuple[int, int]:
    """(width, height) of the picture; raises ConfigError for sides that the model cannot make."""
    if config.width is None or config.height is None:
        return output_size(pipe, [picture.size for picture in pictures], sizes)
    multiple = side_multiple(pipe)
    wrong = {
        f"generate.{name}": side
        for name, side in (("width", config.width), ("height", config.height))
        if side % multiple
    }
    if wrong:
        nearest = {name: max(1, round(side / multiple)) * multiple for name, side in wrong.items()}
        raise ConfigError(
            f"{type(pipe).__name__} makes pictures whose sides are multiples of {multiple} pixels",
            [f"{name}: found {side}; the nearest is {nearest[name]}" for name, side in wrong.items()],
        )
    return config.width, config.height


def _guidance(pipe: Any, config: GenerateConfig) -> dict[str, Any]:
    """Arguments of the pipeline's call for guidance; raises ConfigError for a kind that it does not take."""
    parameters, name = _parameters(pipe), type(pipe).__name__
    options: dict[str, Any] = {}
    scale = config.guidance_scale
    if scale is not None and not ("guidance_scale" in parameters and is_guidance_distilled(pipe)):
        raise ConfigError(
            f"generate.guidance_scale is {scale:g}, but this {name} is not guidance-distilled and would ignore it; "
            "leave it out"
        )
    scale = usual_guidance(pipe) if scale is None else scale
    if scale is not None:
        options["guidance_scale"] = scale
    if "true_cfg_scale" in parameters:
        options["true_cfg_scale"] = config.true_cfg_scale
        if config.true_cfg_scale > 1:
            options["negative_prompt"] = config.negative_prompt
    elif config.true_cfg_scale > 1:
        raise ConfigError(f"{name} takes no true_cfg_scale, found {config.true_cfg_scale}: set it to 1")
    return options


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters
