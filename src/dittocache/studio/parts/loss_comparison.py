"""The loss curves of several runs in one chart."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from dittocache.quality.loss_curve import smoothed, smoothing_window
from dittocache.studio.parts.loss_chart import GREY
from dittocache.studio.run_history import Curves
from dittocache.studio.shown import shown

# Seven of the Okabe-Ito colours, which colour-blind eyes tell apart; light enough for both themes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")
DASHES = ("solid", "dashed", "dotted")


class LossComparison:
    """A chart that is hidden until a run with losses is chosen."""

    def __init__(self) -> None:
        self._chart = ui.echart(_options({})).classes("chart").props('role=img aria-label="Loss curves of runs"')
        self._chart.set_visibility(False)

    def show(self, curves: Curves) -> None:
        """Draw the moving averages of these losses, one line a run."""
        self._chart.set_visibility(bool(curves))
        self._chart.options.clear()
        self._chart.options.update(_options(curves))
        self._chart.update()


def _options(curves: Curves) -> dict[str, Any]:
    axis = {
        "nameTextStyle": {"color": GREY},
        "axisLabel": {"color": GREY},
        "axisLine": {"lineStyle": {"color": GREY}},
        "splitLine": {"lineStyle": {"color": f"{GREY}33"}},
    }
    return {
        "animation": False,
        "grid": {"left": 56, "right": 16, "top": 48, "bottom": 36},
        "legend": {"top": 0, "type": "scroll", "textStyle": {"color": GREY}},
        "tooltip": {"trigger": "axis", "renderMode": "richText"},
        "xAxis": {"type": "value", "name": "step", "nameLocation": "middle", "nameGap": 24, "min": "dataMin", **axis},
        "yAxis": {"type": "value", "scale": True, **axis},
        "series": [_series(number, name, points) for number, (name, points) in enumerate(curves.items())],
    }


def _series(number: int, name: str, points: tuple[tuple[int, float], ...]) -> dict[str, Any]:
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    averages = smoothed([loss for _, loss in points], smoothing_window(len(points))).tolist()
    return {
        "type": "line",
        "name": shown(name, 60),
        "showSymbol": len(points) < 2,
        "lineStyle": {"width": 2, "type": dash, "color": colour},
        "itemStyle": {"color": colour},
        "data": [[step, average] for (step, _), average in zip(points, averages, strict=True)],
    }
