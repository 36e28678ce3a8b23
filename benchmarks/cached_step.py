"""How long a cached training step waits for its data, on the bundled model or on any run's settings.

    python benchmarks/cached_step.py [--config C] [--train.batch_size 8 --train.steps 20 ...]

Caches the data set, then trains a throw-away LoRA through the real loop. The first step, which has nothing read ahead
yet, is told apart. Prints the wait as a share of the step (goal: below 2 %) and adds it to
benchmarks/results/cached_step.jsonl.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from dittocache.config import RunConfig, load_config, parse_overrides
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.jobs.demo_job import demo_config
from dittocache.jobs.inputs import RunInputs, load_manifest
from dittocache.jobs.stages import CACHE
from dittocache.jobs.terminal import TerminalListener
from dittocache.jobs.workflow import run_workflow
from dittocache.quality.machine import describe_machine
from dittocache.training.loop import TrainState, train_lora
from dittocache.training.lora import add_lora
from dittocache.training.sources import CachedSource

RESULTS = Path(__file__).parent / "results"
GOAL = 0.02
SETTINGS = {"train.batch_size": 8, "train.steps": 20}


def main(words: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="dittocache-cached-step-") as folder:
        own = {"name": "cached-step", "output_dir": f"{folder}/runs", "cache.cache_dir": f"{folder}/cache"}
        config = _config({**own, **SETTINGS, **parse_overrides(words)})
        with TerminalListener() as listener:
            run_dir = run_workflow(config, CACHE, listener)
        states = _train(RunInputs(config, run_dir))
    first, rest = states[0], states[1:]
    waits = [state.load_seconds / state.step_seconds for state in rest]
    found = {
        "steps": len(states),
        "batch_size": config.train.batch_size,
        "seconds_per_step": statistics.median(state.step_seconds for state in rest),
        "share_waiting": sum(state.load_seconds for state in rest) / sum(state.step_seconds for state in rest),
        "share_waiting_worst_step": max(waits),
        "first_step_wait_seconds": first.load_seconds,
        "share_waiting_first_included": sum(s.load_seconds for s in states) / sum(s.step_seconds for s in states),
    }
    machine = describe_machine()
    print(f"\n{config.model.path}, batch size {config.train.batch_size}, on {machine.cpu}, {machine.cores} cores")
    print(f"{found['seconds_per_step']:.3f} s a step; of it, waiting for cached data:")
    print(f"  {found['share_waiting']:.3%} of all steps after the first (goal: below {GOAL:.0%})")
    print(f"  {found['share_waiting_worst_step']:.3%} in the worst of them")
    print(f"  {found['share_waiting_first_included']:.3%} of all {len(states)} steps")
    print(f"  {found['first_step_wait_seconds'] * 1e3:.1f} ms in the first")
    RESULTS.mkdir(exist_ok=True)
    row = {"date": datetime.now().astimezone().isoformat(), "machine": asdict(machine), **found}
    with (RESULTS / "cached_step.jsonl").open("a") as stream:
        stream.write(json.dumps({**row, "config": config.model_dump(mode="json")}) + "\n")


def _train(inputs: RunInputs) -> list[TrainState]:
    manifest = load_manifest(inputs)
    source = CachedSource(CachedSamples(inputs.store, manifest))
    transformer = inputs.family.load_pipeline(inputs.model, ["transformer"], inputs.dtype, inputs.device).transformer
    add_lora(transformer, inputs.family, inputs.config.train)
    names = list(manifest.samples)
    return list(train_lora(transformer, inputs.family, source, names, inputs.config.train))


def _config(overrides: dict[str, Any]) -> RunConfig:
    path = overrides.pop("config", None)
    return demo_config(overrides) if path is None else load_config(Path(path), overrides)


if __name__ == "__main__":
    main(sys.argv[1:])
