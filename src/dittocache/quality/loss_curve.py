"""The loss curve as inline SVG.

Drawn here rather than by a plotting library, because it takes its colours from the page's style sheet (one
drawing serves light, dark and print) and its text stays text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 12.0, 12.0, 46.0
"""Margins in SVG units (CSS pixels at full size) for the axis labels."""


def smoothed(values: Sequence[float], window: int) -> NDArray[np.float64]:
    """Centred moving average, as long as the values; shorter at both ends, blind to values that are not finite.

    Args:
        window: how many values are averaged, odd.
    """
    data = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(data)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, data, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centres = np.arange(len(data))
    starts = np.maximum(centres - window // 2, 0)
    ends = np.minimum(centres + window // 2 + 1, len(data))
    held = counts[ends] - counts[starts]
    averages: NDArray[np.float64] = np.where(held > 0, (sums[ends] - sums[starts]) / np.maximum(held, 1), np.nan)
    return averages


def smoothing_window(count: int) -> int:
    """How many losses the line averages: a tenth of them, odd, at least 5."""
    return max(5, count // 10) | 1


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from low to high, about as many as asked."""
    raw = (high - low) / max(about, 1)
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / distance - 1e-9)
    last = math.floor(high / distance + 1e-9)
    return [round(index * distance, 12) for index in range(first, last + 1)]


def loss_svg(steps: Sequence[int], losses: Sequence[float], width: float, height: float) -> Markup:
    """Raw losses as points, their moving average as a line, both axes labelled.

    The page describes the figure in words, so the drawing itself is hidden from screen readers. Its classes
    (`raw`, `smooth`, `gridline`) are coloured by the report's style sheet.

    Args:
        width, height: size in CSS pixels at which the text is 13 pixels high.

    Returns:
        one `<svg>` element, the same for the same numbers. Losses that are not finite are left out.

    Raises:
        ValueError: `steps` and `losses` differ in length, or are empty.
    """
    if not steps or len(steps) != len(losses):
        raise ValueError(
            f"a loss curve of {len(steps)} steps and {len(losses)} losses; expected as many of each, at least one"
        )
    line = smoothed(losses, smoothing_window(len(losses)))
    highest = _highest(losses, line)
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (width - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        return _TOP + (1 - min(loss, highest) / highest) * (height - _TOP - _BOTTOM)

    bottom = height - _BOTTOM
    parts = [f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true" focusable="false">']
    loss_ticks = ticks(0.0, highest, 4)
    digits = max(0, -math.floor(math.log10(loss_ticks[1]) + 1e-9)) if len(loss_ticks) > 1 else 2
    for loss in loss_ticks:
        parts.append(
            f'<line class="gridline" x1="{_LEFT:g}" x2="{width - _RIGHT:g}" y1="{y(loss):.1f}" y2="{y(loss):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8:g}" y="{y(loss) + 4.5:.1f}" text-anchor="end">{loss:.{digits}f}</text>')
    for step in _step_ticks(first, last, width):
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{step:,}</text>')
    points = [(x(step), y(loss)) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    parts.append(f'<path class="raw" d="{"".join(f"M{left:.1f} {top:.1f}h0" for left, top in points)}"/>')
    curve = [(x(step), y(loss)) for step, loss in zip(steps, line, strict=True) if math.isfinite(loss)]
    parts.append(f'<polyline class="smooth" points="{" ".join(f"{left:.1f},{top:.1f}" for left, top in curve)}"/>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 6:.1f}" text-anchor="middle">Optimizer step</text>')
    across = (_TOP + bottom) / 2
    parts.append(f'<text transform="translate(14 {across:.1f}) rotate(-90)" text-anchor="middle">Loss</text>')
    parts.append("</svg>")
    return Markup("".join(parts))  # numbers only: nothing to escape


def _step_ticks(first: int, last: int, width: float) -> list[int]:
    """The first step and round steps after it that leave room for their labels."""
    round_steps = [int(step) for step in ticks(first, last, int(width // 110)) if step == int(step)]
    gap = (last - first) * 40 / width
    return [first, *(step for step in round_steps if step - first > gap)]


def _highest(losses: Sequence[float], line: NDArray[np.float64]) -> float:
    """The loss at the top of the axis: a few outliers must not press the curve flat, so they sit at the edge."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return 1.0
    return max(float(np.quantile(finite, 0.99)) * 1.1, float(np.nanmax(line)) * 1.1, 1e-9)
