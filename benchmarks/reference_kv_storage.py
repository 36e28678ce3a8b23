"""What each way to keep references takes: memory, time of a cached step, and picture quality.

    python -m benchmarks.reference_kv_storage [--edits 8] [--steps 8] [--pairs 5]

Memory and time on a transformer of random weights and 1024 noise + 1024 reference tokens, every way in turn within a
round; times are the median over rounds of the ratio to `native`, in seconds of the process. Theory for
`modulated_input`: 4 d^2 operations a reference token more. Offloading on a CPU is a plain copy; on CUDA copies run
beside the computation.

Quality on the bundled model: PSNR of the pictures of each way against those of `native` (what storage alone changes)
and against uncached ones, held-out edits, references computed at the first step only. Saves
benchmarks/results/reference_kv_storage.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.reference_kv import RESULTS, Case, Steps
from benchmarks.reference_kv_quality import Runs, Setting
from benchmarks.sampling_caches import LAYERS, transformer

from dittocache.demo.edits import evaluation_edits
from dittocache.quality.machine import describe_machine
from dittocache.quality.metrics import capped, psnr
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.session import cached

ONCE = ReferenceKVConfig(refresh=(0,))
WAYS: dict[str, ReferenceKVConfig] = {
    "native": ONCE,
    "fp8": ONCE.model_copy(update={"storage": "fp8"}),
    "modulated_input": ONCE.model_copy(update={"storage": "modulated_input"}),
    "native, offloaded": ONCE.model_copy(update={"offload": True}),
    "fp8, offloaded": ONCE.model_copy(update={"storage": "fp8", "offload": True}),
}


def step_costs(case: Case, pairs: int) -> list[dict[str, Any]]:
    """A row a way: bytes, and the time of a cached step relative to `native`."""
    model = transformer()
    calls = Steps(model, case, time.process_time)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    held: dict[str, dict[str, int]] = {}
    for _ in range(pairs + 1):  # the first round warms up
        for name, config in WAYS.items():
            with cached(model, reference_kv=config) as trace:
                seconds[name].append(calls.run(2, torch.no_grad())[1])
            held[name] = {"device": trace.bytes_held, "host": trace.host_bytes_held}
            held[name]["predicted"] = trace.reference_bytes_predicted
    native = seconds["native"][1:]
    projections = 4 * case.width**2 * case.reference / case.cached
    return [
        {
            "way": name,
            **held[name],
            "step": statistics.median(one / base for one, base in zip(seconds[name][1:], native, strict=True)),
            "theory": 1 + projections if name == "modulated_input" else 1.0,
        }
        for name in WAYS
    ]


def qualities(edits: int, steps: int) -> list[dict[str, Any]]:
    """A row a way: PSNR against `native` and against the uncached picture, mean and worst."""
    runs = Runs("zero", evaluation_edits(edits))
    against: dict[str, dict[str, list[float]]] = {name: {"native": [], "uncached": []} for name in WAYS}
    for number in range(edits):
        uncached, _, _ = runs.run(number, steps, Setting("plain"))
        native, _, _ = runs.run(number, steps, Setting("native", ONCE))
        for name, config in WAYS.items():
            picture, _, _ = runs.run(number, steps, Setting(name, config))
            against[name]["native"].append(capped(psnr(picture, native)))
            against[name]["uncached"].append(capped(psnr(picture, uncached)))
    return [
        {
            "way": name,
            **{f"psnr_{other}": statistics.fmean(values) for other, values in found.items()},
            **{f"psnr_{other}_worst": min(values) for other, values in found.items()},
        }
        for name, found in against.items()
    ]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print two tables, save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=8, help="held-out edits (default 8)")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps (default 8)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--tokens", type=int, default=1024, help="noise tokens, and as many of references (1024)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    costs = step_costs(Case(options.tokens, options.tokens), options.pairs)
    print(f"{LAYERS} layers, {options.tokens} + {options.tokens} tokens")
    print(f"{'way':20}{'device':>10}{'predicted':>11}{'host':>10}{'step':>8}{'theory':>8}")
    for row in costs:
        megabytes = [row[name] / 1e6 for name in ("device", "predicted", "host")]
        print(f"{row['way']:20}{megabytes[0]:>7.1f} MB{megabytes[1]:>8.1f} MB{megabytes[2]:>7.1f} MB", end="")
        print(f"{row['step']:>8.3f}{row['theory']:>8.3f}")
    found = qualities(options.edits, options.steps)
    print(f"\nbundled model, {options.edits} edits, {options.steps} steps: PSNR in dB, mean / worst")
    print(f"{'way':20}{'against native':>18}{'against uncached':>18}")
    for row in found:
        cells = [f"{row[f'psnr_{name}']:.1f} / {row[f'psnr_{name}_worst']:.1f}" for name in ("native", "uncached")]
        print(f"{row['way']:20}{cells[0]:>18}{cells[1]:>18}")
    report = {"layers": LAYERS, "tokens": options.tokens, "costs": costs, "steps": options.steps, "quality": found}
    report["machine"] = asdict(describe_machine())
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "reference_kv_storage.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
