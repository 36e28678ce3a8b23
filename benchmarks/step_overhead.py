"""What a step cache costs by itself: its share of a computed step, and what is left of a skipped one.

    python benchmarks/step_overhead.py [--tokens 24 288] [--rounds 20]

A Qwen-Image transformer with 60 thin blocks (width 128), so that whatever is done besides computing shows. A skipped
step is timed as it is. A few tenths of a per cent of a computed step drown in the noise of its 60 blocks, so what a
cache adds to one is measured on the same transformer with blocks that do nothing, hooks and all, bare and cached runs
taking turns; both are told as shares of the bare step with its blocks. Times are the processor's, with one thread: wall
time without what other programs take. The median of all steps counts.

Computed steps are measured with caches that are on and never skip, skipped ones with caches that skip whatever they
may. Ours are put on as users do it, by `dittocache.cached`, the trace included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

import step_peers
from dittocache.quality.machine import describe_machine
from dittocache.sampling.session import cached, without_remarks
from dittocache.teacache.config import TeaCacheConfig

RESULTS = Path(__file__).parent / "results"
STEPS, BLOCKS, HEADS, HEAD_WIDTH, CHANNELS, TEXT_WIDTH, TEXT_TOKENS = 24, 60, 4, 32, 64, 64, 8
WARM_UP = 3
"""First steps of a run that do not count, and the last one: no cache is at work there, or not yet."""
EVERYTHING: dict[str, Any] = {"coefficients": (1.0, 0.0), "max_consecutive_skips": STEPS}
Method = Callable[[Any], AbstractContextManager[Any]]


def pipeline(blocks_compute: bool) -> Any:
    """A pipeline of a scheduler and a transformer of 60 blocks, width 128, that compute or do nothing."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS // 4,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 14, 14),
    )
    transformer.eval().requires_grad_(False)
    if not blocks_compute:
        for block in transformer.transformer_blocks:
            block.forward = _nothing
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)


def _nothing(
    hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder_hidden_states, hidden_states


def bare(pipe: Any) -> AbstractContextManager[Any]:
    """No cache."""
    return nullcontext()


def ours(**settings: Any) -> Method:
    """The step cache with these settings."""
    config = TeaCacheConfig.model_validate(settings)
    return lambda pipe: cached(pipe, config)


def methods() -> dict[str, tuple[Method, Method]]:
    """Name -> (on and never skipping, skipping whatever it may)."""
    found = {
        "distance gate, residual (spec)": (
            ours(rel_l1_thresh=1e-12, coefficients=(1.0, 0.0)),
            ours(rel_l1_thresh=1e9, **EVERYTHING),
        ),
        "distance gate, output_linear": (
            ours(rel_l1_thresh=1e-12, coefficients=(1.0, 0.0), prediction="output_linear"),
            ours(rel_l1_thresh=1e9, prediction="output_linear", **EVERYTHING),
        ),
        "error gate, noise_linear": (
            ours(gate="error", error_tolerance=1e-30),
            ours(gate="error", error_tolerance=1e9, max_consecutive_skips=STEPS),
        ),
        "schedule, noise_linear": (
            ours(gate="schedule", schedule=tuple(range(STEPS))),
            ours(gate="schedule", schedule=(0, 1)),
        ),
    }
    for name, (peer, never, always) in {
        "diffusers FirstBlockCache": (step_peers.first_block_cache, -1.0, 1e9),
        "diffusers MagCache": (step_peers.mag_cache, -1.0, 1e9),
        "diffusers TaylorSeer lite": (step_peers.taylorseer, 1, STEPS),
        "diffusers SeaCache": (step_peers.sea_cache, 0.0, 1e9),
    }.items():
        found[name] = (
            lambda pipe, p=peer, k=never: p(pipe, k, STEPS),
            lambda pipe, p=peer, k=always: p(pipe, k, STEPS),
        )
    return found


class Steps:
    """Times the steps of runs of one pipeline, and knows which of them ran the middle block."""

    def __init__(self, tokens: int, blocks_compute: bool) -> None:
        self.pipe = pipeline(blocks_compute)
        self.pipe.mag_ratios = lambda: [1.0] * STEPS  # ratios that let MagCache skip what it may
        side = next(side for side in range(int(tokens**0.5), 0, -1) if tokens % side == 0)
        self._latents = torch.randn(1, tokens, CHANNELS)
        self._kwargs = {
            "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH),
            "img_shapes": [[(1, side, tokens // side)]],
            "return_dict": False,
        }
        self._ran = 0
        block = self.pipe.transformer.transformer_blocks[BLOCKS // 2]
        inner = block.attn.to_q.forward if blocks_compute else block.forward
        (block.attn.to_q if blocks_compute else block).forward = self._counted(inner)

    @torch.no_grad()
    def run(self, method: Method) -> tuple[list[float], list[float]]:
        """The processor's seconds of computed and of skipped steps."""
        transformer, scheduler = self.pipe.transformer, self.pipe.scheduler
        scheduler.set_timesteps(STEPS)
        computed, skipped, latents = [], [], self._latents
        with method(self.pipe):
            for step, t in enumerate(scheduler.timesteps):
                timestep = t[None] / 1000
                self._ran, began = 0, time.process_time()
                with transformer.cache_context("cond"):
                    velocity = transformer(hidden_states=latents, timestep=timestep, **self._kwargs)[0]
                seconds = time.process_time() - began
                if WARM_UP <= step < STEPS - 1:
                    (computed if self._ran else skipped).append(seconds)
                latents = scheduler.step(velocity, t, latents)[0]
            if hasattr(transformer, "_reset_stateful_cache"):
                transformer._reset_stateful_cache()
        return computed, skipped

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._ran += 1
            return forward(*args, **kwargs)

        return counted


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a bare step; by method, as shares of it, what a computed step costs more and a skipped one."""
    whole, emptied = Steps(tokens, blocks_compute=True), Steps(tokens, blocks_compute=False)
    steps: list[float] = []
    more: dict[str, list[float]] = {name: [] for name in methods()}
    left: dict[str, list[float]] = {name: [] for name in methods()}
    emptied.run(bare)
    for number in range(rounds):
        if number % 4 == 0:
            steps += whole.run(bare)[0]
        for name, (never, always) in methods().items():
            before, with_cache, after = (emptied.run(one)[0] for one in (bare, never, bare))
            if len(with_cache) == len(before):  # one that skips even so is told nothing about
                more[name].append(statistics.median(with_cache) - statistics.median(before + after))
            if number % 4 == 0:
                left[name] += whole.run(always)[1]
    step = statistics.median(steps)
    return {
        "bare_step_ms": 1000 * step,
        "methods": {
            name: {"computed_overhead": _share(more[name], step), "skipped_share": _share(left[name], step)}
            for name in more
        },
    }


def _share(seconds: Sequence[float], step: float) -> float | None:
    return statistics.median(seconds) / step if seconds else None


def printed(tokens: int, found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{BLOCKS} blocks, width {HEADS * HEAD_WIDTH}, {tokens} tokens; shares of a bare step of "
        f"{found['bare_step_ms']:.1f} ms",
        f"{'method':34}{'computed step':>16}{'skipped step':>16}",
    ]
    for name, row in found["methods"].items():
        more, left = row["computed_overhead"], row["skipped_share"]
        cells = ("-" if more is None else f"{more:+.2%}", "-" if left is None else f"{left:.2%}")
        lines.append(f"{name:34}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@without_remarks()  # that a cache skips nothing is the point here
def main(words: Sequence[str] | None = None) -> dict[int, Any]:
    """Measure, print a table, write `results/step_overhead.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 288], help="noise tokens")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of runs (default 20)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[int, Any] = {}
    with _one_thread():
        for tokens in options.tokens:
            results[tokens] = measure(tokens, options.rounds)
            print(f"\n{printed(tokens, results[tokens])}", flush=True)
            report = {"measured": results, "machine": asdict(describe_machine())}
            (options.out / "step_overhead.json").write_text(json.dumps(report, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
