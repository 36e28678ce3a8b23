"""What every step cache saves and costs on the bundled model: speed beside picture quality.

    python benchmarks/step_cache.py [--edits 32] [--steps 28 50] [--guidance 1 4] [--only "error"] [--rounds 1]

Each method is swept over its own main knob, on the same held-out edits, seeds and steps. The reference is the run
without a cache; the baseline is *fewer plain steps*, which also saves time and needs no cache at all. Every cached run
is paired with the uncached run of the same edit just before or after it, so that a busy machine slows both; the speed
is the median of the ratios of the pipeline's whole call. `passes` is the number of steps over the number of steps whose
blocks ran: what a model has to gain whose blocks are all of its time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import step_peers
from dittocache.demo.edits import evaluation_edits
from dittocache.demo.evaluate import generate
from dittocache.demo.model import load_pipeline
from dittocache.quality.machine import describe_machine
from dittocache.quality.metrics import capped, psnr, ssim
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

RESULTS = Path(__file__).parent / "results"
SPEEDS = (1.5, 2.0, 2.5)
FEWER = "fewer plain steps"


@dataclass(frozen=True)
class Setting:
    """A method at one value of its knob; `steps` where it takes other steps than the uncached run."""

    method: str
    knob: float
    cache: Callable[[Any], AbstractContextManager[Any]]
    steps: int | None = None
    ours: bool = False


@dataclass(frozen=True)
class Row:
    """A setting over all edits, against the uncached run."""

    method: str
    knob: float
    ours: bool
    speed: float
    passes: float
    psnr_mean: float
    psnr_worst: float
    ssim_mean: float


def our_settings() -> Iterator[Setting]:
    """The spec's TeaCache, its linear predictions, the error gate and even schedules."""

    def with_settings(**settings: Any) -> Callable[[Any], AbstractContextManager[Any]]:
        config = TeaCacheConfig.model_validate(settings)
        return lambda pipe: cached(pipe, config)

    for threshold in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8):
        yield Setting("TeaCache (spec)", threshold, with_settings(rel_l1_thresh=threshold), ours=True)
    for prediction in ("residual_linear", "output_linear"):
        for threshold in (0.02, 0.05, 0.1, 0.2):
            chosen = with_settings(rel_l1_thresh=threshold, prediction=prediction)
            yield Setting(f"distance gate, {prediction}", threshold, chosen, ours=True)
        for tolerance in (0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.003):
            chosen = with_settings(gate="error", error_tolerance=tolerance, prediction=prediction)
            yield Setting(f"error gate, {prediction}", tolerance, chosen, ours=True)


def even_schedules(steps: int) -> Iterator[Setting]:
    """Every second or third step computed, the output extrapolated between."""
    for interval in (2, 3, 4):
        computed = tuple(sorted({0, 1, *range(1, steps, interval), steps - 1}))
        config = TeaCacheConfig(gate="schedule", schedule=computed)
        yield Setting("every n-th step, output_linear", interval, lambda pipe, c=config: cached(pipe, c), ours=True)


def fewer_steps(steps: int) -> Iterator[Setting]:
    """Plain runs with fewer steps."""
    for speed in (1.25, 1.5, 1.75, 2.0, 2.5, 3.0):
        yield Setting(FEWER, round(steps / speed), lambda pipe: nullcontext(), round(steps / speed))


def peer_settings(steps: int) -> Iterator[Setting]:
    """Other projects' caches."""
    for name, (peer, knobs) in step_peers.peers().items():
        for knob in knobs:
            yield Setting(name, knob, lambda pipe, p=peer, k=knob: p(pipe, k, steps))


class Runs:
    """Runs edits on the pipeline, with and without a cache, in pairs."""

    def __init__(self, count: int, guidance: float) -> None:
        self.pipe = load_pipeline()
        self._edits = evaluation_edits(count)
        self._sources = [edit.images()[0] for edit in self._edits]
        self._options = {"true_cfg_scale": guidance, **({"negative_prompt": " "} if guidance > 1 else {})}
        self._ran = 0
        blocks = self.pipe.transformer.transformer_blocks
        blocks[len(blocks) // 2].attn.to_q.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._ran += 1

    def run(self, number: int, steps: int) -> tuple[Image.Image, float, int]:
        """Picture, seconds, and passes of the middle block."""
        self._ran, began = 0, time.perf_counter()
        edit = self._edits[number]
        picture = generate(self.pipe, self._sources[number], edit.instruction, number, steps, **self._options)
        return picture, time.perf_counter() - began, self._ran

    def measure(self, setting: Setting, steps: int, rounds: int) -> Row:
        """The setting over all edits, each beside its uncached run."""
        speeds, passes, decibels, similarities = [], [], [], []
        for number in range(len(self._edits)):
            ratios = []
            for turn in range(rounds):
                first = turn % 2 == 0
                before = self.run(number, steps) if first else None
                with setting.cache(self.pipe):
                    picture, seconds, ran = self.run(number, setting.steps or steps)
                plain, plain_seconds, plain_ran = before or self.run(number, steps)
                ratios.append(plain_seconds / seconds)
            speeds.append(statistics.median(ratios))
            passes.append(plain_ran / max(1, ran))
            decibels.append(capped(psnr(picture, plain)))
            similarities.append(ssim(picture, plain))
        return Row(
            setting.method,
            setting.knob,
            setting.ours,
            statistics.median(speeds),
            statistics.mean(passes),
            statistics.mean(decibels),
            min(decibels),
            statistics.mean(similarities),
        )


def at_speed(rows: Sequence[Row], speed: float) -> float | None:
    """PSNR of a method at this speed: on the line between the two settings around it; None beyond its settings."""
    ordered = sorted(rows, key=lambda row: row.speed)
    for slower, faster in zip(ordered, ordered[1:], strict=False):
        if slower.speed <= speed <= faster.speed:
            share = 0.0 if faster.speed == slower.speed else (speed - slower.speed) / (faster.speed - slower.speed)
            return slower.psnr_mean + share * (faster.psnr_mean - slower.psnr_mean)
    return None


def pareto(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """By method, PSNR at each of the speeds that are compared."""
    methods = dict.fromkeys(row.method for row in rows)
    return {
        method: {f"{speed}x": at_speed([row for row in rows if row.method == method], speed) for speed in SPEEDS}
        for method in methods
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(options: argparse.Namespace, steps: int, guidance: float) -> dict[str, Any]:
    """All methods at one number of steps and guidance."""
    runs = Runs(options.edits, guidance)
    wanted = [*fewer_steps(steps), *our_settings(), *even_schedules(steps), *peer_settings(steps)]
    wanted = [one for one in wanted if options.only in one.method]
    if any("MagCache" in one.method for one in wanted):
        runs.pipe.mag_ratios = {steps: step_peers.mag_ratios(runs.pipe, steps, lambda: runs.run(0, steps))}
    print(f"\n{steps} steps, guidance {guidance:g}, {options.edits} held-out edits")
    print(f"{'method':34}{'knob':>8}{'speed':>8}{'passes':>8}{'PSNR':>8}{'worst':>8}{'SSIM':>9}")
    rows = []
    for setting in wanted:
        row = runs.measure(setting, steps, options.rounds)
        rows.append(row)
        print(
            f"{row.method:34}{row.knob:8g}{row.speed:7.2f}x{row.passes:7.2f}x{row.psnr_mean:8.1f}"
            f"{row.psnr_worst:8.1f}{row.ssim_mean:9.5f}",
            flush=True,
        )
    table = pareto(rows)
    print(f"\n{'PSNR at the same speed':34}" + "".join(f"{speed:>9g}x" for speed in SPEEDS))
    for method, values in table.items():
        print(f"{method:34}" + "".join("         -" if v is None else f"{v:10.1f}" for v in values.values()))
    return {"steps": steps, "guidance": guidance, "rows": [asdict(row) for row in rows], "pareto": table}


def plot(result: dict[str, Any], path: Path) -> None:
    """PSNR over speed, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        points = sorted((row["speed"], row["psnr_mean"]) for row in result["rows"] if row["method"] == method)
        ours = any(row["ours"] for row in result["rows"] if row["method"] == method)
        style = "--" if method == FEWER else "-" if ours else ":"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=method, linewidth=2 if ours else 1)
    axes.set(xlabel="speed against no cache (wall time)", ylabel="PSNR against no cache, dB")
    axes.set_title(f"{result['steps']} steps, guidance {result['guidance']:g}")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print tables, write `results/step_cache.json` and a plot for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=32, help="held-out edits (default 32)")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50], help="steps of the uncached run")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0], help="true_cfg_scale; 1 is off")
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--rounds", type=int, default=1, help="pairs an edit (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with _threads(options.threads):
        for guidance in options.guidance:
            for steps in options.steps:
                results.append(compare(options, steps, guidance))
                report = {"cases": results, "edits": options.edits, "machine": asdict(describe_machine())}
                (options.out / "step_cache.json").write_text(json.dumps(report, indent=2) + "\n")
                plot(results[-1], options.out / f"step_cache-{steps}-steps-guidance-{guidance:g}.png")


if __name__ == "__main__":
    main()
