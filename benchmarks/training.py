"""Training on cached, mixed and live embeddings: the same model, samples, batches and noise.

    python benchmarks/training.py [--epochs 2] [--rounds 3] [--share 0.5] [--train.batch_size 1 ...]
    python benchmarks/training.py --family flux          a tiny random model of that family
    python benchmarks/training.py --config C             any run's settings

The bundled model on its 40 edits by default. The data set is cached once, into a folder that is removed at the end, and
timed. Then each way trains in a process of its own, so that its peak memory is its own: all three in turn, in every
round, so that another load on the machine meets all alike. `mixed` has `--share` of the samples in the cache and
encodes the rest live. Prints a table, saves all in benchmarks/results/training.json and ends with an error where the
losses of the ways are not the same bit for bit.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dittocache.config import RunConfig, load_config, parse_overrides
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.errors import DataError
from dittocache.events import read_events
from dittocache.jobs.demo_job import demo_config
from dittocache.jobs.inputs import RunInputs, load_manifest
from dittocache.jobs.lora_training import live_source, peak_bytes
from dittocache.jobs.run_folder import CONFIG_NAME, EVENTS_NAME
from dittocache.jobs.stages import CACHE, CACHING
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
CLAIM = "claimed elsewhere, with no method given: 2 to 3 times as fast, 30 to 50 % less memory"
TINY_SAMPLES = 24


def main(words: Sequence[str]) -> None:
    overrides = parse_overrides(words)
    epochs, rounds = int(overrides.pop("epochs", 2)), int(overrides.pop("rounds", 3))
    share = float(overrides.pop("share", 0.5))
    results = Path(overrides.pop("results", RESULTS))
    family = overrides.get("family")
    with tempfile.TemporaryDirectory(prefix="dittocache-training-") as folder:
        config = settings_of(Path(folder), overrides)
        with TerminalListener() as listener:
            run_dir = run_workflow(config, CACHE, listener)
        caching = caching_costs(run_dir)
        found = [
            {way: _in_a_process(way, run_dir, epochs, share) for way in turned(WAYS, number)}
            for number in range(rounds)
        ]
    report = summary(config, share, caching, found)
    print(table(report))
    results.mkdir(parents=True, exist_ok=True)
    name = "training.json" if family is None else f"training-{family}.json"
    (results / name).write_text(json.dumps(report, indent=2) + "\n")
    if not report["losses_identical"]:
        sys.exit("the losses of the ways are not the same: see the results")


def measured(way: str, run_dir: Path, epochs: int, share: float = 0.5) -> dict[str, Any]:
    """Train for `epochs` in one way; seconds a step and an epoch, peak memory in bytes, and all losses."""
    inputs = RunInputs(load_config(run_dir / CONFIG_NAME), run_dir)
    names = list(load_manifest(inputs).samples)
    size = inputs.config.train.batch_size * inputs.config.train.gradient_accumulation_steps
    steps = max(WARM_UP_STEPS + 1, epochs * len(names) // size)
    train = inputs.config.train.model_copy(update={"steps": steps})
    accelerator = make_accelerator(train, inputs.device)
    source = _source(way, inputs, names, share)
    transformer = load_frozen(inputs.model, inputs.family, train, inputs.dtype, inputs.device)
    add_lora(transformer, inputs.family, train)
    dropout = inputs.config.data.caption_dropout
    states = list(train_lora(transformer, inputs.family, source, names, train, accelerator, caption_dropout=dropout))
    timed = states[WARM_UP_STEPS:]
    mean = statistics.fmean(state.step_seconds for state in timed)
    return {
        "samples": len(names),
        "encoded_live": len(source.encoded_live) if isinstance(source, MixedSource) else None,
        "steps": steps,
        "seconds_per_step": statistics.median(state.step_seconds for state in timed),
        "seconds_per_epoch": mean * len(names) / size,
        "load_share": sum(state.load_seconds for state in timed) / sum(state.step_seconds for state in timed),
        "peak_bytes": peak_bytes(),
        "losses": [state.loss for state in states],
    }


def summary(
    config: RunConfig, share: float, caching: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What was found in all rounds, on what, and what follows: times are medians, memory is the most of all rounds."""
    ways = {
        way: {
            "seconds_per_step": statistics.median(one[way]["seconds_per_step"] for one in rounds),
            "seconds_per_epoch": statistics.median(one[way]["seconds_per_epoch"] for one in rounds),
            "load_share": statistics.median(one[way]["load_share"] for one in rounds),
            "peak_bytes": max(one[way]["peak_bytes"] for one in rounds),
            "speedup_over_live": [
                one["live"]["seconds_per_epoch"] / one[way]["seconds_per_epoch"] for one in rounds
            ],  # of every round: both sides met the same load
        }
        for way in WAYS
    }
    cached, live = ways["cached"], ways["live"]
    saved_in_an_epoch = live["seconds_per_epoch"] - cached["seconds_per_epoch"]
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": vars(describe_machine()),
        "config": config.model_dump(mode="json"),
        "share_cached_in_mixed": share,
        "caching": dict(caching),
        "ways": ways,
        "rounds": [dict(one) for one in rounds],
        "losses_identical": all(
            way["losses"] == rounds[0]["cached"]["losses"] for one in rounds for way in one.values()
        ),
        "speedup": statistics.median(cached["speedup_over_live"]),
        "memory_saved": 1 - cached["peak_bytes"] / live["peak_bytes"],
        "first_epoch_with_caching_seconds": caching["seconds"] + cached["seconds_per_epoch"],
        "epochs_until_caching_pays": caching["seconds"] / saved_in_an_epoch if saved_in_an_epoch > 0 else None,
        "claim": CLAIM,
    }


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{'':8}{'s/step':>9}{'s/epoch':>9}{'loading':>9}{'peak MB':>9}{'over live':>11}{'of rounds':>14}"]
    for way, row in report["ways"].items():
        times = f"{row['seconds_per_step']:>9.3f}{row['seconds_per_epoch']:>9.2f}{row['load_share']:>9.0%}"
        ratios = row["speedup_over_live"]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}x"
        lines.append(f"{way:8}{times}{row['peak_bytes'] / 1e6:>9.0f}{statistics.median(ratios):>10.2f}x{spread:>14}")
    caching, first = report["caching"], report["first_epoch_with_caching_seconds"]
    pays = report["epochs_until_caching_pays"]
    after = "never" if pays is None else f"after {pays:.1f} epochs"
    same = "identical, bit for bit" if report["losses_identical"] else "NOT the same"
    return "\n".join(
        [
            *lines,
            f"caching {caching['seconds']:.2f} s; the first epoch with it {first:.2f} s; it pays {after}",
            f"losses of all ways and rounds: {same}",
            f"cached: {report['speedup']:.2f}x as fast as live, {report['memory_saved']:.0%} less peak memory",
            report["claim"],
        ]
    )


def settings_of(folder: Path, overrides: dict[str, Any]) -> RunConfig:
    """The run's settings, with its cache and outcome in `folder`; takes `family` and `config` out of `overrides`.

    No caption is dropped unless asked for: a live trainer would encode the empty prompt only for those it drops, but
    `LiveSource` does for all, which would count against it.
    """
    own = {"name": "benchmark-training", "output_dir": folder / "runs", "cache.cache_dir": folder / "cache"}
    family, path = overrides.pop("family", None), overrides.pop("config", None)
    chosen = {**own, "data.caption_dropout": 0.0, **overrides}
    if path is not None:
        return load_config(Path(path), chosen)
    return demo_config(chosen if family is None else {**tiny_run(folder, family), **chosen})


def tiny_run(folder: Path, family_name: str) -> dict[str, Any]:
    """Settings for a tiny random model of a family and a set of pictures of noise, both made in `folder`."""
    from PIL import Image

    from dittocache.demo.tiny import save_tiny
    from dittocache.families.registry import get_family

    save_tiny(folder / "model", family_name)
    parts = ["training_images", *(["control_images"] if _edits(get_family(family_name)) else [])]
    rng = random.Random(0)
    for part in parts:
        (folder / "set" / part).mkdir(parents=True)
        for number in range(TINY_SAMPLES):
            noise = Image.frombytes("RGB", (6, 6), rng.randbytes(108))
            noise.resize((64, 64)).save(folder / "set" / part / f"{number:02d}.png")
            (folder / "set/training_images" / f"{number:02d}.txt").write_text(f"make it number {number}\n")
    model = {"model.path": str(folder / "model"), "model.family": family_name}
    sizes = {"data.path": folder / "set", "data.resolution": 64, "data.condition_resolution": 32}
    return {**model, **sizes, "held_out": None}


def caching_costs(run_dir: Path) -> dict[str, Any]:
    """Seconds, samples and bytes of the caching stages of a run."""
    results = [
        event
        for event in read_events(run_dir / EVENTS_NAME)
        if event["kind"] == "result" and event["stage"] in CACHING and "bytes_written" in event
    ]
    return {
        "seconds": sum(one["seconds"] for one in results),
        "records": sum(one["encoded"] for one in results),
        "records_there_already": sum(one["reused"] for one in results),
        "bytes": sum(one["bytes_written"] for one in results),
    }


def turned(ways: Sequence[str], number: int) -> list[str]:
    """The ways in another order in every round, so that none is always the first."""
    start = number % len(ways)
    return [*ways[start:], *ways[:start]]


def shared_out(names: Sequence[str], share: float) -> list[str]:
    """`share` of the names, evenly spread."""
    return [name for number, name in enumerate(names) if int((number + 1) * share) > int(number * share)]


def _edits(family: Any) -> bool:
    """Whether the family needs a picture to edit."""
    from dittocache.data.sample import Sample
    from dittocache.families.base import Sizes

    try:
        family.artifacts(Sample("", Path("target.png"), (), "", (64, 64)), Sizes(64, 32))
    except DataError:
        return True
    return False


def _source(way: str, inputs: RunInputs, names: Sequence[str], share: float) -> Source:
    if way == "live":
        return live_source(inputs)
    manifest = load_manifest(inputs)
    if way == "cached":
        return CachedSource(CachedSamples(inputs.store, manifest))
    kept = set(shared_out(names, share))
    part = CachedSource(CachedSamples(inputs.store, manifest.without([name for name in names if name not in kept])))
    return MixedSource(part, lambda: live_source(inputs), lambda text: None)


def _in_a_process(way: str, run_dir: Path, epochs: int, share: float) -> dict[str, Any]:
    print(f"training: {way}", file=sys.stderr)
    command = [sys.executable, __file__, "--way", way, str(run_dir), str(epochs), str(share)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--way"]:
        print(json.dumps(measured(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))))
    else:
        main(sys.argv[1:])
