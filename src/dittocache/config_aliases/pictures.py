"""What the specification's configs say about the sizes of pictures and about masks."""

from __future__ import annotations

import math
import re
from typing import Any

from dittocache.config_aliases.nested import put, taken

MASK_LOSS = "MaskEditLoss"
LOSSES = (MASK_LOSS, "AttentionMaskMseLoss", "MseLoss", "MSELoss")


def apply_sizes(settings: dict[str, Any], problems: list[str]) -> None:
    """Sizes are (height, width) or numbers of pixels there; here a resolution, and whether pictures are cut to it."""
    prefix = "data.init_args.processor.init_args."
    kind = taken(settings, f"{prefix}process_type", None)
    size = taken(settings, f"{prefix}target_size", None)
    legacy = taken(settings, "data.init_args.image_size", None)
    pixels = taken(settings, f"{prefix}target_pixels", None)
    controls = [taken(settings, prefix + name, None) for name in ("controls_size", "controls_pixels")]
    if kind not in (None, "center_crop", "fixed_pixels"):
        problems.append(
            f"{prefix}process_type: found {kind!r}; expected center_crop (data.buckets: false here) or fixed_pixels "
            "(data.buckets: true), which distort and pad nothing"
        )
        return
    frame, area = _frame(size if size is not None else legacy), _area(pixels)
    if (size is not None or legacy is not None) and frame is None:
        problems.append(f"{prefix}target_size: found {size or legacy!r}; expected [height, width] in pixels")
    if pixels is not None and area is None:
        problems.append(f"{prefix}target_pixels: found {pixels!r}; expected a number such as 1024*1024")
    cut = frame is not None and kind != "fixed_pixels"
    if frame is not None:
        width, height = frame
        resolution: Any = width if width == height else [[width, height]]
        put(settings, "data.resolution", resolution, f"{prefix}target_size", problems)
        area = width * height
    elif area is not None:
        put(settings, "data.resolution", round(math.sqrt(area)), f"{prefix}target_pixels", problems)
    if cut:
        put(settings, "data.buckets", False, f"{prefix}process_type", problems)
    _control_sizes(settings, controls, area, problems)


def _control_sizes(settings: dict[str, Any], found: list[Any], target: int | None, problems: list[str]) -> None:
    sizes, pixels = found
    listed = [_frame(one) for one in ([sizes] if _frame(sizes) else sizes or [])]
    areas = [frame[0] * frame[1] if frame else None for frame in listed]
    areas += [_area(one) for one in (pixels if isinstance(pixels, list) else [pixels] if pixels is not None else [])]
    if not areas:
        return
    if None in areas or len(set(areas)) > 1:
        problems.append(
            f"data.init_args.processor.init_args.controls_size: found {sizes or pixels!r}; all control pictures are "
            "brought to one area: write data.control_resolution, or leave it out for that of the target"
        )
    elif areas[0] != target:
        side = round(math.sqrt(areas[0] or 0))
        put(settings, "data.control_resolution", side, "data.init_args.processor.init_args.controls_size", problems)


def _frame(size: Any) -> tuple[int, int] | None:
    """(width, height) of [height, width]."""
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size):
        return size[1], size[0]
    return None


def _area(pixels: Any) -> int | None:
    """A number of pixels, `512*512` included."""
    found = re.fullmatch(r"\s*(\d+)\s*(?:\*\s*(\d+)\s*)?", str(pixels))
    return int(found[1]) * int(found[2] or 1) if found else None


def apply_loss(settings: dict[str, Any], problems: list[str]) -> None:
    """The loss is the mean squared error; a sample's mask weighs it by its brightness, so that black is 0."""
    masked = taken(settings, "loss.mask_loss", None)
    path = str(taken(settings, "loss.class_path", None) or "")
    weights: dict[str, Any] = {}
    for place in ("loss.", "loss.init_args."):
        for name in ("forground_weight", "foreground_weight", "background_weight"):
            value = taken(settings, place + name, None)
            if value is not None:
                weights[name] = value
        if taken(settings, f"{place}reduction", "mean") != "mean":
            problems.append(f"{place}reduction: the loss is a mean; leave it out")
        taken(settings, f"{place}eps", None)  # no mask of ours is without weight
    if path and not path.endswith(LOSSES):
        problems.append(f"loss.class_path: found {path!r}; expected one of {', '.join(LOSSES)}, or leave it out")
    if masked not in (None, True, False):
        problems.append(f"loss.mask_loss: found {masked!r}; expected true or false")
    weighs = masked is True or path.endswith(MASK_LOSS) or (weights and masked is None)
    if weighs and weights.get("background_weight", 1.0) != 0:
        problems.append(
            f"loss.background_weight: found {weights.get('background_weight', 'nothing, which means 1.0')!r}; expected "
            "0: what a mask leaves black is not learnt here; draw the background grey for a part of the weight"
        )
