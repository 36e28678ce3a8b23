"""The size a picture is brought to: about the same area for all, its own aspect ratio, sides the model can take."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures of any size are brought to.

    Attributes:
        frame: (width, height) in pixels. Buckets have about its area, and their picture's aspect ratio.
        step: the sides of buckets are multiples of this many pixels, at least one step each.
        upscale: False keeps a bucket from being wider or higher than its picture (which one step may be all the same).
        keep_ratio: False makes the frame itself the bucket of all pictures; what stands out is cut off.
    """

    frame: tuple[int, int]
    step: int
    upscale: bool = True
    keep_ratio: bool = True

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels of the bucket of a `width` x `height` picture."""
        ideal = self._ideal(width / height)
        bucket = max(self.step, _nearest(ideal[0], self.step)), max(self.step, _nearest(ideal[1], self.step))
        if self.upscale:
            return bucket
        return min(bucket[0], _at_most(width, self.step)), min(bucket[1], _at_most(height, self.step))

    def _ideal(self, ratio: float) -> tuple[float, float]:
        if not self.keep_ratio:
            return self.frame
        width = math.sqrt(self.frame[0] * self.frame[1] * ratio)
        return width, width / ratio


def bucket_size(width: int, height: int, resolution: int, multiple: int) -> tuple[int, int]:
    """(width, height) in pixels of the bucket of a `width` x `height` picture.

    The bucket has about the area of a square of `resolution` pixels a side, the picture's aspect ratio, and sides that
    are multiples of `multiple`, at least one multiple each. With a multiple of 32 it is what diffusers'
    `calculate_dimensions` gives for the Qwen-Image edit pipelines.
    """
    return Buckets((resolution, resolution), multiple).size_of(width, height)


def _nearest(side: float, step: int) -> int:
    return round(side / step) * step


def _at_most(side: int, step: int) -> int:
    """The largest multiple that is not longer than `side`; one step where none is."""
    return max(step, side // step * step)
