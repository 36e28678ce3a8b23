"""Whether `tune` keeps its word: 20 targets on the bundled model, checked on edits that no search has seen.

    python benchmarks/tuning.py [--samples 8] [--held-out 8] [--unseen 24] [--steps 28] [--guidance 1] [--promise each]

For each target `tune` searches on one set of edits, verifies on a second one and is judged on a third. A *case* is a
target and an unseen edit; it is met where that edit's picture keeps to the target. Beside it stands the share of
targets that the mean over unseen edits keeps to. Nothing is run twice, over targets and over calls:
benchmarks/results/tuning/ holds what was measured. Targets that no setting keeps to count as neither.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dittocache.demo.edits import Edit, evaluation_edits
from dittocache.demo.evaluate import generate
from dittocache.demo.model import load_pipeline
from dittocache.quality.calibration.fitting import calibrated
from dittocache.quality.calibration.recording import recorded
from dittocache.quality.machine import describe_machine
from dittocache.quality.tuning.curve import plot_curve, point_of, table
from dittocache.quality.tuning.measurement import Ledger, mean_speedup, values_of
from dittocache.quality.tuning.pareto import pareto
from dittocache.quality.tuning.settings import PLAIN, Setting, all_methods
from dittocache.quality.tuning.target import Target
from dittocache.quality.tuning.tune import Tuned, tune
from dittocache.sampling.generate import Picture
from dittocache.sampling.session import cached, without_remarks

RESULTS = Path(__file__).parent / "results" / "tuning"
TARGETS = (
    *(f"psnr>={value}" for value in (35, 40, 45, 50, 55, 60, 65)),
    *(f"ssim>={value}" for value in (0.95, 0.97, 0.98, 0.99, 0.995, 0.999)),
    *(f"flip<={value}" for value in (0.05, 0.02, 0.01, 0.005)),
    *(f"speedup>={value}" for value in (1.5, 2, 3)),
)


@dataclass(frozen=True)
class Drawn:
    """A held-out edit of the bundled task; its noise depends on its number."""

    pipe: Any
    edit: Edit
    number: int
    steps: int
    guidance: float

    @property
    def key(self) -> str:
        return f"edit-{self.number}"

    def make(self, setting: Setting) -> Picture:
        options = {"true_cfg_scale": self.guidance, **({"negative_prompt": " "} if self.guidance > 1 else {})}
        source, steps = self.edit.images()[0], setting.steps or self.steps
        with cached(self.pipe, setting.teacache) as trace:
            began = time.perf_counter()
            image = generate(self.pipe, source, self.edit.instruction, self.number, steps, **options)
            seconds = time.perf_counter() - began
        return Picture(image, seconds, trace)


@without_remarks()  # that a mild setting skips nothing is no news here
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--unseen", type=int, default=24)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--promise", choices=("each", "mean"), default="each")
    options = parser.parse_args()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    edits = evaluation_edits(options.samples + options.held_out + options.unseen)
    every = [Drawn(pipe, edit, number, options.steps, options.guidance) for number, edit in enumerate(edits)]
    samples, rest = every[: options.samples], every[options.samples :]
    held_out, unseen = rest[: options.held_out], rest[options.held_out :]
    points = []
    for sample in samples:
        with recorded(pipe) as recording:
            sample.make(Setting("uncached", ""))
        points += recording.points
    methods = all_methods(options.steps, calibrated(points, (), degree=4))
    ledger = Ledger(RESULTS / f"{options.steps}-steps-guidance-{options.guidance:g}")
    rows = []
    for text in TARGETS:
        began, made = time.monotonic(), ledger.made
        found = tune(Target.parse(text), options.promise, methods, samples, held_out, ledger, timed=0)
        rows.append(judged(found, ledger, unseen))
        rows[-1] |= {"runs": ledger.made - made, "seconds": round(time.monotonic() - began)}
        print(json.dumps(rows[-1]), flush=True)
    tried = [setting for method in methods for setting in method.settings]
    measured = [point_of(one, ledger.measure(one, samples)) for one in ledger.settings_of(tried, samples)]
    plot_curve(RESULTS / "pareto.png", measured)
    print("\n" + table(pareto(measured)) + "\n")
    summary = summed_up(rows)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    machine = describe_machine()
    report = {"options": vars(options), "machine": machine.cpu, "cores": machine.cores, "rows": rows, **summary}
    (RESULTS / f"{options.steps}-steps-{options.promise}.json").write_text(json.dumps(report, indent=1) + "\n")


def judged(found: Tuned, ledger: Ledger, unseen: list[Drawn]) -> dict[str, Any]:
    """What the chosen setting does on unseen edits."""
    row: dict[str, Any] = {"target": str(found.target), "setting": None}
    if found.best is None:
        return row
    measured = ledger.measure(found.best.setting, unseen)
    values = values_of(found.target.metric, measured)
    mean = sum(values) / len(values)
    return row | {
        "setting": found.best.setting.label,
        "plain": found.best.setting.method == PLAIN,
        "refused": found.best.refused,
        "speedup": round(mean_speedup(measured), 2),
        "cases": len(values),
        "cases_met": sum(map(found.target.met_by, values)),
        "mean": round(mean, 5),
        "worst": round(max(values) if found.target.metric == "flip" else min(values), 5),
        "mean_met": found.target.met_by(mean),
    }


def summed_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares over all targets that a setting was found for."""
    found = [row for row in rows if row["setting"] is not None]
    cases = sum(row["cases"] for row in found)
    return {
        "targets": len(rows),
        "targets_with_a_setting": len(found),
        "cases": cases,
        "cases_met": round(sum(row["cases_met"] for row in found) / max(1, cases), 4),
        "targets_met_by_the_mean": round(sum(row["mean_met"] for row in found) / max(1, len(found)), 4),
        "runs": sum(row["runs"] for row in rows),
    }


if __name__ == "__main__":
    main()
