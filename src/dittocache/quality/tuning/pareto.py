"""Which settings are worth choosing between: those that no other one beats in both speed and quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class SpeedBesideQuality(Protocol):
    """A setting that was measured: speed-up by transformer passes, mean PSNR in dB."""

    @property
    def speedup(self) -> float:
        """1 without a cache."""
        ...

    @property
    def psnr(self) -> float:
        """Against the uncached pictures."""
        ...


Measured = TypeVar("Measured", bound=SpeedBesideQuality)


def pareto(points: Sequence[Measured]) -> list[Measured]:
    """The points that no other one beats in both speed (by passes) and mean PSNR, from slow to fast."""
    front: list[Measured] = []
    for point in sorted(points, key=lambda one: (-one.speedup, -one.psnr)):
        if not front or point.psnr > front[-1].psnr:
            front.append(point)
    return front[::-1]
