"""How many samples have which size, as bars."""

from __future__ import annotations

from collections.abc import Mapping

from nicegui import ui

MOST_BARS = 40


def size_chart(sizes: Mapping[tuple[int, int], int]) -> None:
    """Draw the counts of sizes (width, height) in pixels; beyond `MOST_BARS`, the most frequent ones."""
    chosen = sorted(sizes, key=lambda size: -sizes[size])[:MOST_BARS]
    bars = sorted(chosen, key=lambda size: (size[0] / size[1], size))
    largest = max(sizes.values())
    with ui.element("div").classes("bars").props('role=list aria-label="Sizes"'):
        for width, height in bars:
            count = sizes[width, height]
            with ui.element("div").classes("bar").props("role=listitem"):
                ui.label(f"{width} × {height}").classes("mono bar-name")
                with ui.element("div").classes("bar-track"):
                    ui.element("div").classes("bar-fill").style(f"width: {100 * count / largest:.1f}%")
                ui.label(f"{count:,}").classes("mono bar-count")
    if len(sizes) > len(bars):
        ui.label(f"and {len(sizes) - len(bars)} rarer sizes").classes("muted small")
