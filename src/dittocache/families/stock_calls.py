"""How a stock pipeline is asked for one picture at given sizes: what differs between pipeline classes.

Training encodes references at the sizes that a family says. Here the pipeline is made to use the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from PIL import Image

from dittocache.errors import ConfigError
from dittocache.families import qwen_image_sizes
from dittocache.families.base import Sizes
from dittocache.families.flux_kontext import reference_size

ControlResolution = int | Literal["own"] | None  # as `Sample.control_resolution`

KONTEXT = "FluxKontextPipeline"
USUAL_STEPS = 28
USUAL_STEPS_OF_SCHNELL = 4  # distilled to few steps
USUAL_GUIDANCE = {KONTEXT: 2.5, "FluxPipeline": 3.5}  # what their authors recommend for guidance-distilled checkpoints
_EDITS_ONLY = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
_ONE_REFERENCE = ("QwenImageEditPipeline", KONTEXT)


def check_references(pipe: Any, pictures: int, accepted: bool) -> None:
    """Raise ConfigError where the pipeline takes none, or only one, or none at all of this many reference pictures.

    Args:
        accepted: whether the pipeline's call has an argument for them.
    """
    name = type(pipe).__name__
    if pictures and not accepted:
        raise ConfigError(f"{name} takes no reference pictures, found {pictures}: leave them out")
    if not pictures and name in _EDITS_ONLY:
        raise ConfigError(f"{name} edits pictures, found none: name one in generate.image")
    if pictures > 1 and name in _ONE_REFERENCE:
        raise ConfigError(f"{name} takes one reference picture, found {pictures}: name one in generate.image")


def output_size(pipe: Any, picture_sizes: Sequence[tuple[int, int]], sizes: Sizes) -> tuple[int, int]:
    """(width, height) in pixels where none is asked for: the last reference's ratio at the area of `resolution`.

    A square without references. Kontext gives its picture the size of its reference, as its authors do.
    """
    if not picture_sizes:
        side = max(1, round(sizes.resolution / side_multiple(pipe))) * side_multiple(pipe)
        return side, side
    if type(pipe).__name__ == KONTEXT:
        return reference_size(*picture_sizes[-1], sizes.resolution)
    return qwen_image_sizes.output_size(picture_sizes, sizes)


def side_multiple(pipe: Any) -> int:
    """Pixels that both sides of a picture must be multiples of: one packed latent, 16 for all families."""
    return int(pipe.vae_scale_factor) * 2


@contextmanager
def picture_options(
    pipe: Any,
    pictures: Sequence[Image.Image],
    size: tuple[int, int],
    sizes: Sizes,
    control_resolution: ControlResolution = None,
) -> Iterator[dict[str, Any]]:
    """Arguments of the pipeline's call for a picture of `size` (width, height) from the references, within the `with`.

    Args:
        control_resolution: to what size the references are brought; None: `sizes.resolution`.

    Raises ConfigError where the pipeline cannot leave references as they are.
    """
    width, height = size
    options: dict[str, Any] = {"width": width, "height": height}
    resolution = sizes.resolution if control_resolution is None else control_resolution
    if type(pipe).__name__ == KONTEXT:
        # Without these it would change both sizes to those of 1024 x 1024.
        options |= {"max_area": width * height, "_auto_resize": False}
        if pictures:
            fitted = reference_size(*pictures[-1].size, resolution)
            options["image"] = [pictures[-1].resize(fitted, Image.Resampling.LANCZOS)]
        yield options
        return
    if pictures:
        options["image"] = list(pictures)
    area_side = _common_side(pipe, pictures) if resolution == "own" else resolution
    with qwen_image_sizes.pipeline_sizes(replace(sizes, resolution=area_side)):
        yield options


def is_guidance_distilled(pipe: Any) -> bool:
    """Whether the transformer takes a guidance scale as an input."""
    return bool(getattr(pipe.transformer.config, "guidance_embeds", False))


def usual_guidance(pipe: Any) -> float | None:
    """`guidance_scale` where none is asked for; None where the pipeline's own default is right, or it takes none."""
    return USUAL_GUIDANCE.get(type(pipe).__name__) if is_guidance_distilled(pipe) else None


def usual_steps(pipe: Any) -> int:
    """Denoising steps where none are asked for."""
    schnell = type(pipe).__name__ == "FluxPipeline" and not is_guidance_distilled(pipe)
    return USUAL_STEPS_OF_SCHNELL if schnell else USUAL_STEPS


def _common_side(pipe: Any, pictures: Sequence[Image.Image]) -> int:
    """Side of the square of the references' own area, which this pipeline has one of for all of them."""
    areas = {picture.width * picture.height for picture in pictures}
    if len(areas) > 1:
        raise ConfigError(
            f"{type(pipe).__name__} brings all references to one area, found pictures of {len(areas)} areas that are "
            "to keep their own: give one reference, or set data.resize_controls to true"
        )
    return round(math.sqrt(areas.pop()))
