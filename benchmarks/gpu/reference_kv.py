"""The reference KV cache at the real size, with random weights: seconds, memory, and the share of what theory allows.

    python -m benchmarks.gpu.reference_kv [--references 1 2 3] [--steps 4 8 28] [--ways once usual exact]
    python -m benchmarks.gpu.reference_kv --tiny

The transformer alone, called step by step as its pipeline does, one CFG branch; encoders and VAE are the same with and
without the cache. Every cached run is paired with a stock run just before it. `once`: references are computed in the
first step and never again; `usual`: as often as the defaults say; `exact`: isolated references, computed once. Theory
counts the floating-point operations of the layers (benchmarks/reference_kv.py). Where memory runs out, the row says so.
Results are saved after every row; started again, the program goes on.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.gpu.workplace import (
    Results,
    Workplace,
    columns,
    common_arguments,
    device_of,
    make_workplace,
    ran_out_of_memory,
    results_path,
    synchronize,
)
from benchmarks.reference_kv import Case
from diffusers import FlowMatchEulerDiscreteScheduler

from dittocache.embeddings.encoding.memory import free_memory
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.isolation import isolate_references
from dittocache.sampling.session import cached
from dittocache.sampling.trace import Trace

WAYS = {"once": ReferenceKVConfig(refresh=(0,)), "usual": ReferenceKVConfig(), "exact": ReferenceKVConfig()}
PROMPT_TOKENS = 64
PICTURE_TOKENS = 196  # of each reference among the text: 384 x 384 pixels, 28 a token
PIXELS = 16  # a side of a token


def main(words: Sequence[str]) -> Results:
    wanted = parser().parse_args(words)
    if wanted.family != "qwen-image-edit-plus":
        raise SystemExit(f"--family {wanted.family}: this benchmark is about qwen-image-edit-plus")
    device, ends = device_of(wanted), time.monotonic() + 60 * wanted.minutes
    with tempfile.TemporaryDirectory(prefix="dittocache-gpu-", dir=wanted.folder) as folder:
        place = make_workplace(Path(folder), wanted.family, wanted.tiny, wanted.resolution, 1)
        settings = {
            "tiny": place.tiny,
            "resolution": place.resolution,
            "dtype": str(place.dtype),
            "pairs": wanted.pairs,
        }
        results = Results(results_path(wanted.results, "reference-kv", place, device), settings, wanted.fresh)
        rows = [
            {"references": references, "steps": steps, "way": way}
            for references in wanted.references
            for steps in wanted.steps
            for way in wanted.ways
        ]
        missing = [row for row in rows if results.find(row) is None]
        if missing:
            pipe = place.family.load_pipeline(str(place.model), ["transformer"], place.dtype, device)
            model = pipe.transformer.eval()
        for row in missing:
            if time.monotonic() > ends:
                print(f"no time left for: {row}; start again to go on", file=sys.stderr, flush=True)
                continue
            results.add(row, measured(model, place, row, wanted.pairs, device))
            print("  ".join(_cells(results.rows[-1])), file=sys.stderr, flush=True)
    print(table(results))
    return results


def parser() -> Any:
    """The program's options."""
    options = common_arguments(__doc__)
    options.add_argument("--references", type=int, nargs="+", default=[1, 2, 3], help="reference pictures")
    options.add_argument("--steps", type=int, nargs="+", default=[4, 8, 28], help="denoising steps of a run")
    options.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="what to measure")
    options.add_argument("--pairs", type=int, default=1, help="pairs of runs that count")
    return options


def measured(model: Any, place: Workplace, row: dict[str, Any], pairs: int, device: str) -> dict[str, Any]:
    """The findings of a row: seconds and peak memory of both runs, saving beside theory; or where memory ran out."""
    steps, config = row["steps"], WAYS[row["way"]]
    doing = "the stock run"
    try:
        calls = Calls(model, place, row["references"], device)
        calls.run(1)  # chooses kernels, allocates
        stock, kept = [], []
        for _ in range(pairs):
            doing = "the stock run"
            seconds, stock_peak = calls.run(steps)
            stock.append(seconds)
            doing = "the cached run"
            with _isolated(model, row["way"] == "exact"), cached(calls.pipe, reference_kv=config) as trace:
                seconds, peak = calls.run(steps)
            kept.append(seconds)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        free_memory()
        return {"out_of_memory": doing}
    saving = 1 - statistics.median(after / before for before, after in zip(stock, kept, strict=True))
    theory = in_theory(calls.case, trace, steps, row["way"] == "exact")
    return {
        "noise_tokens": calls.case.noise,
        "reference_tokens": calls.case.reference,
        "text_tokens": calls.case.text,
        "width": calls.case.width,
        "computed": steps - trace.references_reused,
        "seconds_stock": statistics.median(stock),
        "seconds": statistics.median(kept),
        "saving": saving,
        "theory": theory,
        "share_of_theory": saving / theory if theory else None,
        "peak_bytes_stock": stock_peak,
        "peak_bytes": peak,
        "bytes_held": trace.bytes_held,
    }


def in_theory(case: Case, trace: Trace, steps: int, isolated: bool) -> float:
    """Share of the stock run's operations that the run of `trace` does without."""
    stock = steps * (case.cached + case.references(isolated=False))
    computed = 1 if isolated else steps - trace.references_reused
    return 1 - (steps * case.cached + computed * case.references(isolated)) / stock


class Calls:
    """Calls the transformer step by step, as its pipeline does, with random latents and text."""

    def __init__(self, model: Any, place: Workplace, references: int, device: str) -> None:
        config, side = model.config, place.resolution // PIXELS
        text = 8 if place.tiny else PROMPT_TOKENS + PICTURE_TOKENS * references
        width = config.num_attention_heads * config.attention_head_dim
        self.case = Case(side * side, references * side * side, text, width)
        self.pipe = SimpleNamespace(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler())
        self._device = device

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, place.dtype)

        self._kwargs = {
            "hidden_states": draw(1, self.case.noise + self.case.reference, config.in_channels),
            "encoder_hidden_states": draw(1, text, config.joint_attention_dim),
            "img_shapes": [[(1, side, side)] * (1 + references)],
            "return_dict": False,
        }

    @torch.no_grad()
    def run(self, steps: int) -> tuple[float, int | None]:
        """Seconds of a run, and on a GPU the most bytes that were allocated in it."""
        on_gpu = self._device.startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        model, scheduler = self.pipe.transformer, self.pipe.scheduler
        scheduler.set_timesteps(steps, device=self._device)
        dtype = self._kwargs["hidden_states"].dtype  # type: ignore[attr-defined]
        synchronize(self._device)
        began = time.perf_counter()
        for timestep in scheduler.timesteps:
            with model.cache_context("cond"):
                model(timestep=(timestep[None] / 1000).to(dtype), **self._kwargs)
        synchronize(self._device)
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() if on_gpu else None


@contextmanager
def _isolated(model: Any, isolated: bool) -> Iterator[None]:
    if not isolated:
        yield
        return
    with isolate_references(model):
        yield


def table(results: Results) -> str:
    """The rows for a terminal."""
    heads = ("", "stock s", "cached s", "saved", "theory", "of theory", "stock GB", "peak GB", "kept GB")
    return "\n".join([columns(heads, [_cells(one) for one in results.rows]), f"results: {results.path}"])


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    row = one["row"]
    name = f"{row['references']} reference(s), {row['steps']} steps, {row['way']}"
    if "out_of_memory" in one:
        return (name, f"out of memory: {one['out_of_memory']}", *[""] * 7)
    share = "" if one["share_of_theory"] is None else f"{one['share_of_theory']:.0%}"
    memory = (one["peak_bytes_stock"], one["peak_bytes"], one["bytes_held"])
    return (
        name,
        f"{one['seconds_stock']:.2f}",
        f"{one['seconds']:.2f}",
        f"{one['saving']:.1%}",
        f"{one['theory']:.1%}",
        share,
        *("" if bytes_held is None else f"{bytes_held / 1e9:.2f}" for bytes_held in memory),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
