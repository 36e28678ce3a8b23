"""The loss curve: every step's loss, and their moving average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nicegui import ui

from dittocache.quality.loss_curve import smoothed, smoothing_window

GREY = "#8a9692"


class LossChart:
    """A chart that is hidden until there is a loss."""

    def __init__(self) -> None:
        self._chart = ui.echart(_options()).classes("loss-chart").props('role=img aria-label="Loss curve"')
        self._chart.set_visibility(False)

    def show(self, losses: Sequence[tuple[int, float]]) -> None:
        """Draw these (step, loss) points."""
        self._chart.set_visibility(bool(losses))
        steps = [step for step, _ in losses]
        averages = smoothed([loss for _, loss in losses], smoothing_window(len(losses))).tolist()
        series = self._chart.options["series"]
        series[0]["data"] = [[step, loss] for step, loss in losses]
        series[1]["data"] = [[step, average] for step, average in zip(steps, averages, strict=True)]
        self._chart.update()


def _options() -> dict[str, Any]:
    axis = {
        "nameTextStyle": {"color": GREY},
        "axisLabel": {"color": GREY},
        "axisLine": {"lineStyle": {"color": GREY}},
        "splitLine": {"lineStyle": {"color": f"{GREY}33"}},
    }
    line = {"type": "line", "showSymbol": False, "data": []}
    return {
        "animation": False,
        "grid": {"left": 56, "right": 16, "top": 28, "bottom": 36},
        "legend": {"top": 0, "textStyle": {"color": GREY}, "data": ["loss", "average"]},
        "tooltip": {"trigger": "axis"},
        "xAxis": {"type": "value", "name": "step", "nameLocation": "middle", "nameGap": 24, "min": "dataMin", **axis},
        "yAxis": {"type": "value", "scale": True, **axis},
        "series": [
            {**line, "name": "loss", "lineStyle": {"width": 1, "opacity": 0.45}, "itemStyle": {"color": "#7aa6a2"}},
            {**line, "name": "average", "lineStyle": {"width": 2.5}, "itemStyle": {"color": "#2f8f87"}},
        ],
    }
