"""From single measurements to a table, to what each method gives at the same speed, and to a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_methods import FEWER, Setting
from step_runs import Measured

SPEEDS = (1.5, 2.0, 2.5)
ABOVE_PEERS, ABOVE_FEWER = 3.0, 6.0
"""dB that the best of ours is meant to lie above every peer, and above fewer plain steps."""


@dataclass(frozen=True)
class Row:
    """A setting over all edits, against the uncached runs.

    Attributes:
        speed: ratio of the denoising loop's seconds, see `loop_cost`.
        wall: median ratio of the loop's wall time to that of the uncached runs beside it.
        passes: ratio of the passes of the blocks.
    """

    method: str
    knob: float
    ours: bool
    edits: int
    speed: float
    wall: float
    passes: float
    psnr_mean: float
    psnr_worst: float
    ssim_mean: float
    flip_mean: float


def rows_of(measured: Sequence[Measured], settings: Sequence[Setting]) -> list[Row]:
    """A row for each of `settings` that was measured."""
    rows = []
    for method in dict.fromkeys(setting.method for setting in settings):
        whole = [one for one in measured if one.method == method]
        shares = step_shares(whole)
        for setting in (one for one in settings if one.method == method):
            mine = [one for one in whole if one.knob == setting.knob]
            if mine:
                rows.append(_row(setting, mine, shares))
    return rows


def step_shares(measured: Sequence[Measured]) -> dict[float, float]:
    """What a step costs as a share of a wholly computed one of the same run, by the share of its passes that ran.

    The median over runs of the ratio of medians: another program that slows a run slows all of its steps.
    """
    found: dict[float, list[float]] = {}
    for one in measured:
        full = max(one.step_passes)
        by_share = {
            passes / full: statistics.median(
                seconds for seconds, ran in zip(one.step_seconds, one.step_passes, strict=True) if ran == passes
            )
            for passes in set(one.step_passes)
        }
        for share, seconds in by_share.items():
            found.setdefault(share, []).append(seconds / by_share[1.0])
    return {share: statistics.median(ratios) for share, ratios in found.items()}


def loop_cost(one: Measured, shares: Mapping[float, float]) -> float:
    """The denoising loop's time, in wholly computed steps."""
    full = max(one.step_passes)
    return sum(shares[passes / full] for passes in one.step_passes)


def _row(setting: Setting, mine: Sequence[Measured], shares: Mapping[float, float]) -> Row:
    branches = max(mine[0].step_passes)
    cost = statistics.mean(loop_cost(one, shares) for one in mine)
    return Row(
        method=setting.method,
        knob=setting.knob,
        ours=setting.ours,
        edits=len(mine),
        speed=mine[0].plain_passes / branches / cost,
        wall=statistics.median(one.plain_wall / one.wall for one in mine),
        passes=sum(one.plain_passes for one in mine) / max(1, sum(sum(one.step_passes) for one in mine)),
        psnr_mean=statistics.mean(one.psnr for one in mine),
        psnr_worst=min(one.psnr for one in mine),
        ssim_mean=statistics.mean(one.ssim for one in mine),
        flip_mean=statistics.mean(one.flip for one in mine),
    )


def front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other one beats at both speed and PSNR, the slowest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda one: (one.speed, one.psnr_mean), reverse=True):
        if not best or row.psnr_mean > best[-1].psnr_mean:
            best.append(row)
    return best[::-1]


def at_speed(rows: Sequence[Row], speed: float) -> float | None:
    """PSNR that a method has at this speed or above: on the line between the two settings of its front around it.

    Where its slowest setting is faster still, that one's PSNR; None where its fastest is slower. Settings that skip
    nothing are no end of a line: their PSNR has no bound.
    """
    best = front([row for row in rows if row.passes > 1])
    if not best or best[-1].speed < speed:
        return None
    if best[0].speed >= speed:
        return best[0].psnr_mean
    slower, faster = next(pair for pair in zip(best, best[1:], strict=False) if pair[1].speed >= speed)
    share = (speed - slower.speed) / (faster.speed - slower.speed)
    return slower.psnr_mean + share * (faster.psnr_mean - slower.psnr_mean)


def pareto(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """By method, PSNR at each of the speeds that are compared."""
    return {
        method: {f"{speed}x": at_speed([row for row in rows if row.method == method], speed) for speed in SPEEDS}
        for method in dict.fromkeys(row.method for row in rows)
    }


def lead(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """At each speed our best method, the best peer, and how far ours lies above it and above fewer plain steps."""
    table = pareto(rows)
    ours = {row.method for row in rows if row.ours}
    found: dict[str, dict[str, Any]] = {}
    for speed in (f"{one}x" for one in SPEEDS):
        known = {method: values[speed] for method, values in table.items() if values[speed] is not None}
        mine = {method: value for method, value in known.items() if method in ours}
        peers = {method: value for method, value in known.items() if method not in ours and method != FEWER}
        if not mine:
            continue
        best = max(mine, key=lambda method: mine[method] or 0)
        entry: dict[str, Any] = {"ours": best, "psnr": mine[best]}
        if peers:
            peer = max(peers, key=lambda method: peers[method] or 0)
            entry |= {"best_peer": peer, "above_best_peer": (mine[best] or 0) - (peers[peer] or 0)}
        if FEWER in known:
            entry |= {"above_fewer_steps": (mine[best] or 0) - (known[FEWER] or 0)}
        found[speed] = entry
    return found


def printed(rows: Sequence[Row]) -> str:
    """The table, the PSNR at the same speed, and the lead."""
    lines = [
        f"{'method':42}{'knob':>9}{'edits':>6}{'speed':>8}{'wall':>8}{'passes':>8}{'PSNR':>7}{'worst':>7}{'SSIM':>9}"
        f"{'FLIP':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row.method:42}{row.knob:9g}{row.edits:6}{row.speed:7.2f}x{row.wall:7.2f}x{row.passes:7.2f}x"
            f"{row.psnr_mean:7.1f}{row.psnr_worst:7.1f}{row.ssim_mean:9.5f}{row.flip_mean:9.5f}"
        )
    lines += ["", f"{'PSNR at the same speed or above':42}" + "".join(f"{speed:>9g}x" for speed in SPEEDS)]
    for method, values in pareto(rows).items():
        lines.append(f"{method:42}" + "".join("         -" if v is None else f"{v:10.1f}" for v in values.values()))
    for speed, entry in lead(rows).items():
        peer = f"{entry['above_best_peer']:+.1f} dB above {entry['best_peer']}" if "best_peer" in entry else "no peer"
        fewer = f", {entry['above_fewer_steps']:+.1f} dB above fewer steps" if "above_fewer_steps" in entry else ""
        lines.append(f"{speed}: {entry['ours']}, {entry['psnr']:.1f} dB: {peer}{fewer}")
    return "\n".join(lines)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """PSNR over speed, a line a method: ours solid, peers dotted, fewer steps dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row.method for row in rows):
        mine = sorted((row for row in rows if row.method == method), key=lambda one: one.speed)
        style = "--" if method == FEWER else "-" if mine[0].ours else ":"
        points = [one.speed for one in mine], [one.psnr_mean for one in mine]
        axes.plot(*points, style, marker="o", markersize=4, label=method, linewidth=2 if mine[0].ours else 1.3)
    axes.set(xlabel="speed of the denoising loop against no cache (wall time)", ylabel="PSNR against no cache, dB")
    axes.set_title(title)
    axes.set_xlim(right=min(4.0, axes.get_xlim()[1]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)
