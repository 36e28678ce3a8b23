"""One picture from a pipeline, with or without caches, and what it took."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dittocache.errors import ConfigError
from dittocache.families.base import Sizes
from dittocache.families.pictures import open_picture
from dittocache.families.qwen_image_sizes import output_size, pipeline_sizes
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
    prompt_embeds: Mapping[str, torch.Tensor] | None = None,
) -> Picture:
    """Make one picture of `prompt`, from reference pictures where the pipeline takes them.

    The picture has the last reference's ratio and `sizes.resolution` squared pixels, both sides multiples of 32; the
    same seed gives the same noise with and without caches. Seconds are those of the pipeline's call: encoders,
    denoising and decoder.

    Args:
        pipe: a diffusers pipeline.
        images: reference pictures, or their files; none for text to image.
        prompt: what to do; `config.prompt` is not read here.
        config: steps, guidance, negative prompt and seed.
        sizes: of the result and of the references.
        teacache: settings of the step cache; None: off.
        reference_kv: settings of the reference KV cache; None: off.
        prompt_embeds: arguments of the pipeline that stand for the prompt, each with a batch axis of one; the
            pipeline then needs no text encoder where guidance is off.

    Raises ConfigError for references that the pipeline does not take, DataError naming a file that cannot be read,
    and what `cached` raises.
    """
    pictures = [image if isinstance(image, Image.Image) else open_picture(image) for image in images]
    width, height = output_size([picture.size for picture in pictures], sizes)
    options: dict[str, Any] = {"prompt": prompt, "width": width, "height": height}
    options["num_inference_steps"] = config.num_inference_steps
    options["generator"] = torch.Generator().manual_seed(config.seed)
    accepted = inspect.signature(type(pipe).__call__).parameters
    if prompt_embeds is not None:
        options |= {"prompt": None, **prompt_embeds}
    if pictures:
        if "image" not in accepted:
            raise ConfigError(
                f"{type(pipe).__name__} takes no reference pictures, found {len(pictures)}: leave them out"
            )
        options["image"] = pictures
    if "true_cfg_scale" in accepted:
        options["true_cfg_scale"] = config.true_cfg_scale
        if config.true_cfg_scale > 1:
            options["negative_prompt"] = config.negative_prompt
    elif config.true_cfg_scale > 1:
        raise ConfigError(f"{type(pipe).__name__} takes no true_cfg_scale, found {config.true_cfg_scale}: set it to 1")
    with pipeline_sizes(sizes), cached(pipe, teacache, reference_kv) as trace:
        began = time.perf_counter()
        image = pipe(**options).images[0]
        seconds = time.perf_counter() - began
    return Picture(image, seconds, trace)
