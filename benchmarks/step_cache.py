"""What every step cache saves and costs on the bundled model: speed beside picture quality.

    python benchmarks/step_cache.py [--cells 28:1 28:4 50:1 50:4] [--edits 32] [--minutes 60] [--only error SeaCache]

Each method is swept over its own main knob, on the same held-out edits, seeds and steps. The reference is the run
without a cache; the baseline is *fewer plain steps*, which also saves time and needs no cache at all.

`speed` is that of the denoising loop: a skipped step counts with its time as a share of the computed steps of the same
run, and a computed step as one of the uncached run (what caches add to it is below 2 %: see step_overhead.py). On a
machine that others use, this is steadier than `wall`, the plain ratio of wall times to the uncached runs before and
after. Encoders and decoder are in neither: no step cache touches them. `passes` counts the runs of the blocks.

A cell is a number of steps and a guidance (true_cfg_scale; 1 is off). Measurements are kept in the folder of the
results as they are made: an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dittocache.quality.machine import describe_machine
from dittocache.sampling.session import without_remarks
from step_methods import all_settings
from step_runs import Bench, Ledger, measure
from step_tables import lead, pareto, plot, printed, rows_of
from step_tuned import tuned

RESULTS = Path(__file__).parent / "results"


@without_remarks()  # that a mild setting skips nothing is no news here
def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print tables, write `step_cache.json` and a plot for each cell."""
    options = parser().parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    ends = time.monotonic() + 60 * options.minutes
    cells: dict[str, dict[str, Any]] = {}
    for cell in options.cells:
        steps, guidance, edits = (*cell, options.edits)[:3]
        cells[f"{steps}:{guidance:g}"] = compared(options, steps, guidance, edits, ends)
        machine = asdict(describe_machine(("torch", "diffusers", "cache-dit")))
        content = {"cells": list(cells.values()), "threads": options.threads, "machine": machine}
        (options.out / "step_cache.json").write_text(json.dumps(content, indent=1) + "\n")
    return list(cells.values())


def compared(options: argparse.Namespace, steps: int, guidance: float, edits: int, ends: float) -> dict[str, Any]:
    """All methods at one number of steps and guidance."""
    name = f"{steps}-steps-guidance-{guidance:g}"
    bench = functools.cache(lambda: Bench(steps, guidance))
    calibrations = functools.cache(lambda: bench().calibrations())
    choices = functools.cache(lambda: tuned(bench(), calibrations(), options.out / f"tuned-{name}"))
    settings = all_settings(steps, guidance > 1, calibrations, choices)
    wanted = [one for one in settings if not options.only or any(part in one.method for part in options.only)]
    ledger = Ledger(options.out / f"step_cache-{name}.jsonl")
    measure(bench, ledger, wanted, range(edits), ends)
    known = {(one.method, one.knob) for one in ledger.rows}
    rows = rows_of(ledger.complete([one for one in settings if (one.method, one.knob) in known]), settings)
    title = f"{steps} steps, guidance {guidance:g}, {max((row.edits for row in rows), default=0)} held-out edits"
    print(f"\n{title}\n{printed(rows)}", flush=True)
    if rows:
        plot(rows, title, options.out / f"step_cache-{name}.png")
    found = {"steps": steps, "guidance": guidance, "rows": [asdict(row) for row in rows]}
    return found | {"pareto": pareto(rows), "lead": lead(rows)}


def parser() -> argparse.ArgumentParser:
    """The program's options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [(28, 1.0), (28, 4.0), (50, 1.0), (50, 4.0)]
    form = "STEPS:GUIDANCE[:EDITS]"
    options.add_argument("--cells", type=_cell, nargs="+", default=everything, metavar=form, help="what to compare at")
    options.add_argument("--edits", type=int, default=32, help="held-out edits where a cell names none (default 32)")
    options.add_argument("--only", nargs="+", default=(), help="measure methods whose name holds one of these")
    options.add_argument("--minutes", type=float, default=60, help="nothing new is begun after so long (default 60)")
    options.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return options


def _cell(text: str) -> tuple[float, ...]:
    steps, guidance, *edits = text.split(":")
    return (int(steps), float(guidance), *map(int, edits))


if __name__ == "__main__":
    main()
