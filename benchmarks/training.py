"""Training on cached, live and mixed embeddings: the same model, samples, batches and noise.

    python benchmarks/training.py [--epochs 2] [--config C] [--train.batch_size 1 ...]

The bundled model on its 40 edits, or any run's settings. The data set is cached first; each way trains in a process
of its own, so that its peak memory is its own. Mixed has every other sample in the cache. Prints seconds a step and an
epoch, peak memory, and whether the losses are the same bit for bit; saves all in benchmarks/results/training.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dittocache.config import RunConfig, load_config, parse_overrides
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.jobs.demo_job import demo_config
from dittocache.jobs.inputs import RunInputs, load_manifest
from dittocache.jobs.lora_training import live_source, peak_bytes
from dittocache.jobs.run_folder import CONFIG_NAME
from dittocache.jobs.stages import CACHE
from dittocache.jobs.terminal import TerminalListener
from dittocache.jobs.workflow import run_workflow
from dittocache.quality.machine import describe_machine
from dittocache.training.accelerator import make_accelerator
from dittocache.training.frozen_base import load_frozen
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora
from dittocache.training.sources import CachedSource, MixedSource, Source

RESULTS = Path(__file__).parent / "results"
WAYS = ("cached", "mixed", "live")
WARM_UP_STEPS = 2  # the first steps allocate; they count for the losses, not for the times


def main(words: Sequence[str]) -> None:
    overrides = {"name": "benchmark-training", "data.caption_dropout": 0.1, **parse_overrides(words)}
    epochs = int(overrides.pop("epochs", 2))
    config = _config(overrides)
    with TerminalListener() as listener:
        run_dir = run_workflow(config, CACHE, listener)
    found = {way: _in_a_process(way, run_dir, epochs) for way in WAYS}
    report = summary(config, found)
    print(table(report))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "training.json").write_text(json.dumps(report, indent=2) + "\n")


def measured(way: str, run_dir: Path, epochs: int) -> dict[str, Any]:
    """Train for `epochs` in one way; seconds a step and an epoch, peak memory in bytes, and all losses."""
    inputs = RunInputs(load_config(run_dir / CONFIG_NAME), run_dir)
    names = list(load_manifest(inputs).samples)
    size = inputs.config.train.batch_size * inputs.config.train.gradient_accumulation_steps
    steps = max(WARM_UP_STEPS + 1, epochs * len(names) // size)
    train = inputs.config.train.model_copy(update={"steps": steps})
    accelerator = make_accelerator(train, inputs.device)
    source = _source(way, inputs, names)
    transformer = load_frozen(inputs.model, inputs.family, train, inputs.dtype, inputs.device)
    add_lora(transformer, inputs.family, train)
    dropout = inputs.config.data.caption_dropout
    states = list(train_lora(transformer, inputs.family, source, names, train, accelerator, caption_dropout=dropout))
    timed = states[WARM_UP_STEPS:]
    mean = statistics.fmean(state.step_seconds for state in timed)
    return {
        "steps": steps,
        "seconds_per_step": statistics.median(state.step_seconds for state in timed),
        "seconds_per_epoch": mean * len(names) / size,
        "load_share": sum(state.load_seconds for state in timed) / sum(state.step_seconds for state in timed),
        "peak_bytes": peak_bytes(),
        "losses": [state.loss for state in states],
    }


def summary(config: RunConfig, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The findings of all ways with what they were found on, and what follows from them."""
    cached, live = found["cached"], found["live"]
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": vars(describe_machine()),
        "config": config.model_dump(mode="json"),
        "ways": found,
        "losses_identical": all(way["losses"] == cached["losses"] for way in found.values()),
        "speedup": live["seconds_per_epoch"] / cached["seconds_per_epoch"],
        "memory_saved": 1 - cached["peak_bytes"] / live["peak_bytes"],
    }


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{'':8}{'s/step':>9}{'s/epoch':>9}{'loading':>9}{'peak MB':>9}{'last loss':>11}"]
    for way, row in report["ways"].items():
        times = f"{row['seconds_per_step']:>9.3f}{row['seconds_per_epoch']:>9.2f}{row['load_share']:>9.0%}"
        lines.append(f"{way:8}{times}{row['peak_bytes'] / 1e6:>9.0f}{row['losses'][-1]:>11.6f}")
    same = "identical, bit for bit" if report["losses_identical"] else "NOT the same"
    lines.append(f"losses of all ways: {same}")
    lines.append(f"cached: {report['speedup']:.2f}x as fast as live, {report['memory_saved']:.0%} less peak memory")
    return "\n".join(lines)


def _source(way: str, inputs: RunInputs, names: Sequence[str]) -> Source:
    if way == "live":
        return live_source(inputs)
    manifest = load_manifest(inputs)
    if way == "cached":
        return CachedSource(CachedSamples(inputs.store, manifest))
    half = CachedSource(CachedSamples(inputs.store, manifest.without(names[::2])))
    return MixedSource(half, lambda: live_source(inputs), lambda text: None)


def _in_a_process(way: str, run_dir: Path, epochs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, str(run_dir), str(epochs)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _config(overrides: dict[str, Any]) -> RunConfig:
    path = overrides.pop("config", None)
    return demo_config(overrides) if path is None else load_config(Path(path), overrides)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--way"]:
        print(json.dumps(measured(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main(sys.argv[1:])
