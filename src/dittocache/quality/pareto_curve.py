"""Speed beside quality of a tuning's settings as inline SVG, coloured by the report's style sheet."""

from __future__ import annotations

from markupsafe import Markup, escape

from dittocache.quality.loss_curve import ticks
from dittocache.quality.metrics import PSNR_CAP
from dittocache.quality.report_tuning import TuningPoint, TuningSection
from dittocache.quality.units import decibels_text, ratio_text

_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 20.0, 16.0, 46.0


def pareto_svg(section: TuningSection, width: float, height: float) -> Markup:
    """A point for each setting, and a line through those that nothing beats.

    Settings that change nothing (PSNR at its cap) are left out unless there are no others: they would press the rest
    together. Classes: `cache`, `plain`, `chosen`, `front`, `gridline`.

    Args:
        width, height: size in CSS pixels at which the text is 13 pixels high.
    """
    points = [point for point in section.points if point.psnr < PSNR_CAP] or list(section.points)
    fast = max(point.speedup for point in points)
    low, high = _padded([point.psnr for point in points])
    first, last = 1.0, max(fast * 1.02, 1.1)

    def x(speedup: float) -> float:
        return _LEFT + (speedup - first) / (last - first) * (width - _LEFT - _RIGHT)

    def y(decibels: float) -> float:
        return _TOP + (high - decibels) / (high - low) * (height - _TOP - _BOTTOM)

    bottom, right = height - _BOTTOM, width - _RIGHT
    parts = [f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true" focusable="false">']
    for level in ticks(low, high, 5):
        parts.append(f'<line class="gridline" x1="{_LEFT:g}" x2="{right:g}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8:g}" y="{y(level) + 4.5:.1f}" text-anchor="end">{level:g}</text>')
    for speedup in ticks(first, last, int(width // 120)):
        parts.append(f'<text x="{x(speedup):.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{speedup:g}×</text>')
    line = " ".join(f"{x(point.speedup):.1f},{y(point.psnr):.1f}" for point in section.front if point in points)
    parts.append(f'<polyline class="front" points="{line}"/>')
    for point in sorted(points, key=lambda one: one.chosen):
        parts.append(_mark(point, x(point.speedup), y(point.psnr)))
    middle, across = (_LEFT + right) / 2, (_TOP + bottom) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{height - 6:.1f}" text-anchor="middle">Speed-up by transformer passes</text>'
        f'<text transform="translate(14 {across:.1f}) rotate(-90)" text-anchor="middle">Mean PSNR, dB</text></svg>'
    )
    return Markup("".join(parts))  # numbers, and labels that are escaped


def _mark(point: TuningPoint, left: float, top: float) -> str:
    """A square for plain steps, a circle for a cache, ringed where it was chosen; its numbers on pointing at it."""
    title = f"<title>{escape(point.label)}: {ratio_text(point.speedup)}, {decibels_text(point.psnr)}</title>"
    ring = f'<circle class="chosen" cx="{left:.1f}" cy="{top:.1f}" r="9"/>' if point.chosen else ""
    if point.plain:
        shape = f'<rect class="plain" x="{left - 4:.1f}" y="{top - 4:.1f}" width="8" height="8">{title}</rect>'
    else:
        shape = f'<circle class="cache" cx="{left:.1f}" cy="{top:.1f}" r="4.5">{title}</circle>'
    return ring + shape


def _padded(values: list[float]) -> tuple[float, float]:
    """Lowest and highest value with some room around them."""
    room = max((max(values) - min(values)) * 0.06, 1.0)
    return min(values) - room, max(values) + room
