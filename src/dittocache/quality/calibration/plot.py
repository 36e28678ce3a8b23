"""A picture of a calibration: every step's distance and change, and the polynomial through them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dittocache.quality.calibration.recording import Point, Subject
from dittocache.teacache.policy import GatePolicy, rescale
from dittocache.teacache.profile import Calibration


def plot_calibration(
    path: Path, points: Sequence[Point], held_out: Sequence[Point], calibration: dict[Subject, Calibration]
) -> Path:
    """Write a PNG with one panel for each thing that can be predicted, and return its path."""
    figure = Figure(figsize=(5.2 * len(calibration), 4.2), layout="constrained")
    for number, (subject, one) in enumerate(calibration.items(), start=1):
        axes = figure.add_subplot(1, len(calibration), number)
        for label, some, colour in (("fitted", points, "C0"), ("held out", held_out, "C1")):
            axes.scatter([p.distance for p in some], [p.change(subject) for p in some], s=8, color=colour, label=label)
        policy = GatePolicy(1.0, one.coefficients, one.fitted_range)
        distances = np.linspace(one.fitted_range[0], one.fitted_range[1], 200)
        axes.plot(distances, [rescale(policy, float(d)) for d in distances], color="black", label="polynomial")
        checked = "none" if one.r2_held_out is None else f"{one.r2_held_out:.2f}"
        axes.set_title(f"{subject}: R² {one.r2_fit:.2f}, held out {checked}")
        axes.set_xlabel("distance of the signal to the step before")
        axes.set_ylabel(f"relative change of the {subject}")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path
