"""Speed beside quality of every setting that was tried, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dittocache.quality.tuning.measurement import Measurement, mean_speedup, values_of, wall_speedup
from dittocache.quality.tuning.pareto import pareto
from dittocache.quality.tuning.settings import Setting


@dataclass(frozen=True)
class Point:
    """A setting over several samples. `speedup` by transformer passes, `wall` by wall time of the whole call."""

    setting: Setting
    samples: int
    speedup: float
    wall: float
    psnr: float
    psnr_worst: float
    ssim: float
    ssim_worst: float
    flip: float
    flip_worst: float
    lpips: float | None
    lpips_worst: float | None

    @property
    def figures(self) -> str:
        """Its quality in words."""
        return f"PSNR {self.psnr:.1f} dB (worst {self.psnr_worst:.1f}), SSIM {self.ssim:.4f}, FLIP {self.flip:.4f}"


def point_of(setting: Setting, measured: Sequence[Measurement]) -> Point:
    """Means and worst cases of what was measured."""
    psnr, ssim, flip = (values_of(metric, measured) for metric in ("psnr", "ssim", "flip"))
    lpips = [one.lpips for one in measured if one.lpips is not None]
    return Point(
        setting=setting,
        samples=len(measured),
        speedup=mean_speedup(measured),
        wall=wall_speedup(measured),
        psnr=statistics.fmean(psnr),
        psnr_worst=min(psnr),
        ssim=statistics.fmean(ssim),
        ssim_worst=min(ssim),
        flip=statistics.fmean(flip),
        flip_worst=max(flip),
        lpips=statistics.fmean(lpips) if lpips else None,
        lpips_worst=max(lpips) if lpips else None,
    )


def table(points: Sequence[Point]) -> str:
    """One line a point, with a heading."""
    width = max([len("setting"), *(len(point.setting.label) for point in points)])
    lines = [
        f"{'setting':<{width}}  passes    wall   PSNR  worst    SSIM   worst    FLIP   worst",
    ]
    for one in points:
        lines.append(
            f"{one.setting.label:<{width}}  {one.speedup:5.2f}x  {one.wall:5.2f}x  {one.psnr:5.1f}  "
            f"{one.psnr_worst:5.1f}  {one.ssim:.4f}  {one.ssim_worst:.4f}  {one.flip:.4f}  {one.flip_worst:.4f}"
        )
    return "\n".join(lines)


def plot_curve(path: Path, points: Sequence[Point]) -> Path:
    """Write a PNG of speed beside mean PSNR, a colour a method, and return its path."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(point.setting.method for point in points):
        some = sorted((p for p in points if p.setting.method == method), key=lambda p: p.speedup)
        axes.plot([p.speedup for p in some], [p.psnr for p in some], "o-", markersize=4, label=method)
    front = pareto(points)
    axes.plot([p.speedup for p in front], [p.psnr for p in front], color="black", linewidth=0.8, label="Pareto")
    axes.set_xlabel("speed-up by transformer passes")
    axes.set_ylabel("mean PSNR against the uncached picture, dB")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path
