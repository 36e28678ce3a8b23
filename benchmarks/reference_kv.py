"""What the reference KV cache saves of a step and of a run, beside what theory allows.

    python -m benchmarks.reference_kv [--cases 1024+1024 512+1024 512+1536] [--steps 4 8 28] [--pairs 5]

Theory: a layer costs 24 d^2 q + 4 d q k for q queries and k keys, of width d. k stays L, so a cached step saves the
share L_ref / L of the blocks' time, and a run of N steps whose references are computed once (N - 1) / N of that; as the
default computes them, in a few more steps of a stock model, accordingly less. With isolated references their queries
attend to R keys instead of L, and the formula is worked out for both parts; runs of theirs are compared with the same
model without the cache, and with the stock model.

Random weights: times do not depend on them. Stock and cached runs take turns; every number is the median over pairs of
the ratio within a pair. On a CPU with one thread the process's own seconds count, so that a busy machine does not.
Prints a table and saves benchmarks/results/reference_kv.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.sampling_caches import (
    CHANNELS,
    HEAD_WIDTH,
    HEADS,
    LAYERS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    picture,
    transformer,
)

from dittocache.quality.machine import describe_machine
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.isolation import isolate_references
from dittocache.referencekv.rules import usual_rule
from dittocache.sampling.session import cached

RESULTS = Path(__file__).parent / "results"
WIDTH = HEADS * HEAD_WIDTH
CLOSE = 0.05  # share of a step that measurement and theory may lie apart


@dataclass(frozen=True)
class Case:
    """Tokens of one picture in the making, of all its references, of the text; the transformer's width."""

    noise: int
    reference: int
    text: int = TEXT_TOKENS
    width: int = WIDTH

    @property
    def cached(self) -> int:
        """Floating-point operations of a layer that has its references' keys and values already."""
        return self._layer(self.text + self.noise, self.text + self.noise + self.reference)

    def references(self, isolated: bool) -> int:
        """The same of what the references themselves take: over all keys, or isolated over their own."""
        return self._layer(self.reference, self.reference if isolated else self.text + self.noise + self.reference)

    def saving(self, computed: int, steps: int, isolated: bool = False) -> float:
        """Share of a run of full steps that is saved where references are computed in so many of its steps."""
        references = self.references(isolated)
        return (1 - computed / steps) * references / (self.cached + references)

    def saving_of_stock(self, computed: int, steps: int) -> float:
        """The same of a run of the stock model, by one with isolated references."""
        stock = self.cached + self.references(isolated=False)
        return 1 - (computed / steps * self.references(isolated=True) + self.cached) / stock

    def _layer(self, queries: int, keys: int) -> int:
        """Projections and MLP, then attention."""
        return 24 * self.width**2 * queries + 4 * self.width * queries * keys


def parse_case(text: str) -> Case:
    """`512+1024` as noise and reference tokens."""
    noise, _, reference = text.partition("+")
    if not (noise.isdigit() and reference.isdigit()):
        raise argparse.ArgumentTypeError(f"expected NOISE+REFERENCE tokens such as 512+1024, found {text!r}")
    return Case(int(noise), int(reference))


class Steps:
    """Calls the transformer as a pipeline does, and times every step."""

    def __init__(self, model: Any, case: Case, clock: Callable[[], float]) -> None:
        self.model = model
        self.reused = 0
        self._clock = clock
        self._kwargs = {
            "hidden_states": torch.randn(1, case.noise + case.reference, CHANNELS),
            "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH),
            "img_shapes": [[picture(case.noise), picture(case.reference)]],
            "return_dict": False,
        }

    @torch.no_grad()
    def run(self, steps: int, cache: AbstractContextManager[Any]) -> list[float]:
        """Seconds of each step; `reused` then says in how many of them the references were kept."""
        seconds = []
        with cache as trace:
            for step in range(steps):
                began = self._clock()
                self.model(timestep=torch.tensor([1 - step / steps]), **self._kwargs)
                seconds.append(self._clock() - began)
        self.reused = 0 if trace is None else trace.references_reused
        return seconds


def measure(case: Case, isolated: bool, run_steps: Sequence[int], pairs: int) -> dict[str, Any]:
    """One row: savings of a cached step and of whole runs, each beside theory.

    Runs get fewer pairs the longer they are: each is a mean over its steps already.
    """
    model = transformer()
    if isolated:
        isolate_references(model)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    calls = Steps(model, case, clock)
    plain = Steps(transformer(), case, clock) if isolated else None
    config = rules(2, isolated)["once"]
    calls.run(2, cached(model, reference_kv=config))  # warms up
    full, reused = [], []
    for _ in range(pairs):
        full += calls.run(1, nullcontext())
        reused.append(calls.run(2, cached(model, reference_kv=config))[1])
    theory = case.saving(0, 1, isolated)
    runs = []
    every = [(count, *rule) for count in run_steps for rule in rules(count, isolated).items()]
    for steps, name, rule in every:
        ratios, of_stock = [], []
        for _ in range(max(1, 2 * pairs // steps)):
            uncached = sum(calls.run(steps, nullcontext()))
            kept = sum(calls.run(steps, cached(model, reference_kv=rule)))
            ratios.append(kept / uncached)
            if plain is not None:
                of_stock.append(kept / sum(plain.run(steps, nullcontext())))
        computed = steps - calls.reused
        found = {"steps": steps, "references": name, "computed": computed, "pairs": len(ratios)}
        saved = {"saving": 1 - statistics.median(ratios), "theory": case.saving(computed, steps, isolated)}
        runs.append(found | saved)
        if of_stock:
            saved = {"saving": 1 - statistics.median(of_stock), "theory": case.saving_of_stock(computed, steps)}
            runs.append(found | {"references": f"{name}, of the stock model"} | saved)
    saving = 1 - statistics.median(after / before for before, after in zip(full, reused, strict=True))
    return {
        **asdict(case),
        "isolated": isolated,
        "seconds_full": statistics.median(full),
        "seconds_cached": statistics.median(reused),
        "step": {"saving": saving, "theory": theory, "pairs": pairs, "within": abs(saving - theory) <= CLOSE},
        "runs": runs,
    }


def rules(steps: int, isolated: bool) -> dict[str, ReferenceKVConfig]:
    """When references are computed, by name: in the first step alone, or as the default has it for stock models."""
    if isolated:
        return {"once": ReferenceKVConfig()}
    usual = usual_rule(steps)  # in words: a transformer that is called by hand does not know how many steps there are
    said = ReferenceKVConfig(refresh=usual.every or usual.steps, extrapolate=usual.extrapolate)
    return {"once": ReferenceKVConfig(refresh=(0,)), "default": said}


def line(row: dict[str, Any]) -> str:
    """One row of the table: measured beside theory."""
    name = f"{row['noise']}+{row['reference']}{', isolated' if row['isolated'] else ''}"
    cells = f"{row['step']['saving']:>12.1%}{row['step']['theory']:>8.1%}"
    for one in row["runs"]:
        cells += f"{one['saving']:>12.1%}{one['theory']:>8.1%}"
    return f"{name:22}{1000 * row['seconds_full']:>9.0f}{cells}"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a table, write `results/reference_kv.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [Case(1024, 1024), Case(512, 1024), Case(512, 1536)]
    parser.add_argument("--cases", type=parse_case, nargs="+", default=cases, help="noise+reference tokens")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 28], help="steps of the runs (4 8 28)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of steps that count (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--no-isolated", action="store_true", help="stock references alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    print(f"{LAYERS} layers, width {WIDTH}; each saving beside theory")
    of_runs = [f"{steps} steps, {name}" for steps in options.steps for name in ("once", "default*")]
    heads = "".join(f"{head:>20}" for head in ("cached step", *of_runs))
    print("* isolated: once again, but beside the stock model, whose references see everything and are not kept")
    print(f"{'noise+reference':22}{'ms full':>9}{heads}")
    rows: list[dict[str, Any]] = []
    options.results.mkdir(parents=True, exist_ok=True)
    for isolated in (False, True)[: 1 if options.no_isolated else 2]:
        for case in options.cases:
            rows.append(measure(case, isolated, options.steps, options.pairs))
            print(line(rows[-1]), flush=True)
            report = {"layers": LAYERS, "width": WIDTH, "rows": rows, "machine": asdict(describe_machine())}
            (options.results / "reference_kv.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
