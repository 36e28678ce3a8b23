"""The size a picture is brought to: about the same area for all, its own aspect ratio, sides the model can take."""

from __future__ import annotations

import math


def bucket_size(width: int, height: int, resolution: int, multiple: int) -> tuple[int, int]:
    """(width, height) in pixels of the bucket of a `width` x `height` picture.

    The bucket has about the area of a square of `resolution` pixels a side, the picture's aspect ratio, and sides that
    are multiples of `multiple`, at least one multiple each. With a multiple of 32 it is what diffusers'
    `calculate_dimensions` gives for the Qwen-Image edit pipelines.
    """
    ratio = width / height
    ideal_width = math.sqrt(resolution**2 * ratio)
    ideal_height = ideal_width / ratio
    return (
        max(multiple, round(ideal_width / multiple) * multiple),
        max(multiple, round(ideal_height / multiple) * multiple),
    )
