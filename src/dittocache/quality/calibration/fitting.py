"""The rescaling polynomial: least squares through the origin, and how much of the change it explains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dittocache.errors import StepCacheError
from dittocache.quality.calibration.recording import SUBJECTS, Point, Subject
from dittocache.teacache.policy import GatePolicy, rescale
from dittocache.teacache.profile import Calibration

Pairs = Sequence[tuple[float, float]]
"""(distance, change)."""

GOOD_R2 = 0.5
"""Below it the distance tells less than half of the change, and a threshold on it means little."""


def fitted(pairs: Pairs, degree: int) -> tuple[float, ...]:
    """Coefficients, highest power first and 0 last, that map distance to change with the least squared error.

    The degree is lowered to the number of different distances. Raises StepCacheError without a pair.
    """
    distances = np.array([distance for distance, _ in pairs])
    changes = np.array([change for _, change in pairs])
    degree = min(degree, len(set(distances[distances > 0].tolist())))
    if degree == 0:
        raise StepCacheError(
            "there is no step to calibrate on: the first and the last are always computed. Take at least 4 steps"
        )
    largest = float(distances.max())
    powers = np.arange(degree, 0, -1)
    # Distances scaled to at most 1, so that high powers stay in the range of floating point.
    columns = (distances[:, None] / largest) ** powers
    solution, *_ = np.linalg.lstsq(columns, changes, rcond=None)
    return (*(float(value) for value in solution / largest**powers), 0.0)


def explained(coefficients: tuple[float, ...], fitted_range: tuple[float, float], pairs: Pairs) -> float | None:
    """R^2 of the polynomial as the gate applies it, over the pairs within its range; None with fewer than two.

    Farther away the gate computes, whatever the polynomial says.
    """
    policy = GatePolicy(1.0, coefficients, fitted_range)
    within = [(distance, change) for distance, change in pairs if distance <= fitted_range[1]]
    if len(within) < 2:
        return None
    changes = [change for _, change in within]
    mean = sum(changes) / len(changes)
    total = sum((change - mean) ** 2 for change in changes)
    left = sum((change - rescale(policy, distance)) ** 2 for distance, change in within)
    if total == 0:
        return 1.0 if left == 0 else -math.inf
    return 1 - left / total


def calibrated(points: Sequence[Point], held_out: Sequence[Point], degree: int) -> dict[Subject, Calibration]:
    """A polynomial for each thing that can be predicted, with R^2 on its own and on the held-out points."""
    return {subject: _calibrated(_pairs(points, subject), _pairs(held_out, subject), degree) for subject in SUBJECTS}


def remarks(calibration: dict[Subject, Calibration]) -> list[str]:
    """Where the fit is bad, in words."""
    found = []
    for subject, one in calibration.items():
        worst = one.r2_fit if one.r2_held_out is None else min(one.r2_fit, one.r2_held_out)
        if not worst >= GOOD_R2:
            found.append(
                f"{subject}: the distance explains little of its change (R^2 {worst:.2f}): a threshold on it means "
                "little for this model. Take gate 'error', which needs no calibration"
            )
        if one.r2_held_out is None:
            found.append(f"{subject}: no held-out steps within the fitted range; give more held-out samples")
    return found


def _calibrated(pairs: Pairs, held_out: Pairs, degree: int) -> Calibration:
    coefficients = fitted(pairs, degree)
    distances = [distance for distance, _ in pairs]
    fitted_range = (min(distances), max(distances))
    if fitted_range[0] == fitted_range[1]:  # a single step: the gate wants a range
        fitted_range = (0.0, fitted_range[1])
    r2 = explained(coefficients, fitted_range, pairs)
    return Calibration(
        coefficients=coefficients,
        fitted_range=fitted_range,
        r2_fit=1.0 if r2 is None else r2,
        r2_held_out=explained(coefficients, fitted_range, held_out),
        points=len(pairs),
        held_out_points=len(held_out),
    )


def _pairs(points: Sequence[Point], subject: Subject) -> Pairs:
    return [
        (point.distance, point.change(subject))
        for point in points
        if math.isfinite(point.distance) and math.isfinite(point.change(subject))
    ]
