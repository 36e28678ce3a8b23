"""Seconds a training step and peak memory, cached against live, on the bundled model or on any run's settings.

    python benchmarks/training_step.py [--config C] [--train.batch_size 1 ...]

Same model, samples, batches and noise; cached goes first, in one process (see `dittocache.jobs.measurement`). Prints a
table and adds it to benchmarks/results/training_step.jsonl.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dittocache.config import RunConfig, load_config, parse_overrides
from dittocache.events import read_events
from dittocache.jobs.demo_job import demo_config
from dittocache.jobs.run_folder import EVENTS_NAME
from dittocache.jobs.stages import CACHE
from dittocache.jobs.terminal import TerminalListener
from dittocache.jobs.workflow import run_workflow
from dittocache.quality.machine import describe_machine

RESULTS = Path(__file__).parent / "results"


def main(words: Sequence[str]) -> None:
    config = _config({"name": "benchmark-training-step", **parse_overrides(words)})
    with TerminalListener() as listener:
        run_dir = run_workflow(config, (*CACHE, "measure"), listener)
    found: dict[str, Any] = {}
    for event in read_events(run_dir / EVENTS_NAME):
        if event["stage"] == "measure" and event["kind"] == "result":
            found = event
    machine = describe_machine()
    print(f"\n{config.model.path}, batch size {config.train.batch_size}, on {machine.cpu}, {machine.cores} cores")
    print(f"{'':8}{'s/step':>10}{'peak MB':>10}")
    for label in ("live", "cached"):
        print(f"{label:8}{found[label]['seconds_per_step']:>10.3f}{found[label]['peak_bytes'] / 1e6:>10.0f}")
    ratio = found["live"]["seconds_per_step"] / found["cached"]["seconds_per_step"]
    print(f"cached steps are {ratio:.2f}x as fast")
    _save({"date": datetime.now().astimezone().isoformat(), "config": config.model_dump(mode="json"), **found})


def _config(overrides: dict[str, Any]) -> RunConfig:
    path = overrides.pop("config", None)
    return demo_config(overrides) if path is None else load_config(Path(path), overrides)


def _save(row: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "training_step.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
