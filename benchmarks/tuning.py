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
from pathlib import Path
from typing import Any

from dittocache.quality.calibration.fitting import calibrated
from dittocache.quality.calibration.recording import recorded
from dittocache.quality.machine import describe_machine
from dittocache.quality.tuning.curve import plot_curve, point_of, table
from dittocache.quality.tuning.measurement import Ledger, mean_speedup, values_of
from dittocache.quality.tuning.pareto import pareto
from dittocache.quality.tuning.settings import PLAIN, Setting, all_methods
from dittocache.quality.tuning.target import Target
from dittocache.quality.tuning.tune import Tuned, tune
from dittocache.sampling.session import without_remarks
from step_runs import Bench
from step_tuned import Drawn

RESULTS = Path(__file__).parent / "results" / "tuning"
TARGETS = (
    *(f"psnr>={value}" for value in (35, 40, 45, 50, 55, 60, 65)),
    *(f"ssim>={value}" for value in (0.95, 0.97, 0.98, 0.99, 0.995, 0.999)),
    *(f"flip<={value}" for value in (0.05, 0.02, 0.01, 0.005)),
    *(f"speedup>={value}" for value in (1.5, 2, 3)),
)


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
    bench = Bench(options.steps, options.guidance)
    every = [Drawn(bench, number) for number in range(options.samples + options.held_out + options.unseen)]
    samples, rest = every[: options.samples], every[options.samples :]
    held_out, unseen = rest[: options.held_out], rest[options.held_out :]
    points = []
    for sample in samples:
        with recorded(bench.pipe) as recording:
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
