"""When reference tokens are computed anew, and how far their drift is followed: decisions from numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REACH = 1.0
"""How far the line through two refreshes is followed, in units of their distance."""


@dataclass(frozen=True)
class RefreshRule:
    """When a run refreshes its references. Without any of the three they are computed once.

    Attributes:
        every: after so many computed steps.
        steps: at these steps, or at the first computed one behind each.
        tolerance: as soon as the keys are expected to have changed by more than this share.
        extrapolate: continue the line through the last two refreshes in between.
    """

    every: int | None = None
    steps: tuple[int, ...] = ()
    tolerance: float | None = None
    extrapolate: bool = False

    @property
    def never_reuses(self) -> bool:
        """Whether every step is a refresh, so that nothing need be kept."""
        return self.every == 1

    @property
    def needs_sigma(self) -> bool:
        """Whether noise levels count; they may have to be read from the device."""
        return self.extrapolate or self.tolerance is not None


EXACT = RefreshRule()
"""References that never change are computed once."""


@dataclass(frozen=True)
class Kept:
    """What a branch keeps, when a step that is about to be computed might reuse it.

    Attributes:
        reused: computed steps since the last refresh.
        step: of the last refresh.
        drift: relative change of the keys that the last refresh measured, None where it was the first.
        measured_over: change of sigma that `drift` was measured over.
        distance: change of sigma since the last refresh.
    """

    reused: int
    step: int
    drift: float | None = None
    measured_over: float = 0.0
    distance: float = 0.0


def refresh_now(rule: RefreshRule, step: int, kept: Kept | None) -> bool:
    """Whether this computed step runs the references too.

    Args:
        step: counts from 0 within the run; skipped steps count here.
        kept: None before the first refresh.
    """
    if kept is None:
        return True
    if rule.every is not None and kept.reused + 1 >= rule.every:
        return True
    if any(kept.step < named <= step for named in rule.steps):
        return True
    return rule.tolerance is not None and expected_drift(kept) > rule.tolerance


def expected_drift(kept: Kept) -> float:
    """Relative change of the keys to be expected at this step: what was measured, in proportion to the noise level.

    Infinite where nothing was measured yet: one refresh more is needed to know.
    """
    if kept.drift is None or kept.measured_over <= 0:
        return float("inf")
    return kept.drift * kept.distance / kept.measured_over


def even_refreshes(steps: int, count: int) -> tuple[int, ...]:
    """`count` of `steps` steps, step 0 first, as far apart as they can be; the last refresh serves as long as any."""
    return tuple(sorted({number * steps // count for number in range(count)}))


def slope_weight(refreshed: Sequence[float], sigma: float, reach: float = REACH) -> float:
    """How many times the change between the last two refreshes is added to the last one, from 0 to `reach`.

    A line in sigma; beyond `reach` times the distance of the two it stays where it is.

    Args:
        refreshed: noise levels of the last refreshes, the newest first; 0 is the answer for fewer than two.
        sigma: noise level of this step.
    """
    if len(refreshed) < 2 or refreshed[0] == refreshed[1]:
        return 0.0
    return min(max((refreshed[0] - sigma) / (refreshed[1] - refreshed[0]), 0.0), reach)
