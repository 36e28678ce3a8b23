"""What a step cache costs by itself: its share of a computed step, and what is left of a skipped one.

    python benchmarks/step_overhead.py [--tokens 24 288] [--rounds 9]

A Qwen-Image transformer with 60 thin blocks (width 128), so that whatever is done besides computing shows. Bare and
cached runs take turns; a number is the median over rounds of the ratio to the bare run beside it. Computed steps are
measured with caches that are on and never skip, skipped ones with caches that skip whatever they may.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

import step_peers
from dittocache.quality.machine import describe_machine
from dittocache.teacache.adapter import TeaCacheAdapter
from dittocache.teacache.config import TeaCacheConfig

RESULTS = Path(__file__).parent / "results"
STEPS, BLOCKS, HEADS, HEAD_WIDTH, CHANNELS, TEXT_WIDTH, TEXT_TOKENS = 12, 60, 4, 32, 64, 64, 8
EVERYTHING = {"coefficients": (1.0, 0.0), "max_consecutive_skips": 4}
Method = Callable[[Any], AbstractContextManager[Any]]


def model() -> Any:
    """A pipeline's shell around a transformer of 60 blocks, width 128."""
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
    return SimpleNamespace(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())


def ours(**settings: Any) -> Method:
    """TeaCache with these settings."""

    @contextmanager
    def on(pipe: Any) -> Iterator[None]:
        adapter = TeaCacheAdapter(TeaCacheConfig.model_validate(settings))
        adapter.apply(pipe)
        try:
            yield
        finally:
            adapter.remove(pipe)

    return on


def methods() -> dict[str, tuple[Method, Method]]:
    """Name -> (on and never skipping, skipping whatever it may)."""
    found = {
        "distance gate, residual (spec)": (ours(rel_l1_thresh=1e-12), ours(rel_l1_thresh=1e9, **EVERYTHING)),
        "distance gate, output_linear": (
            ours(rel_l1_thresh=1e-12, prediction="output_linear"),
            ours(rel_l1_thresh=1e9, prediction="output_linear", **EVERYTHING),
        ),
        "error gate, output_linear": (
            ours(gate="error", error_tolerance=1e-30),
            ours(gate="error", error_tolerance=1e9),
        ),
        "schedule, output_linear": (
            ours(gate="schedule", schedule=tuple(range(STEPS))),
            ours(gate="schedule", schedule=(0, 1, 6)),
        ),
    }
    for name, (peer, never, always) in {
        "diffusers FirstBlockCache": (step_peers.first_block_cache, 0.0, 1e9),
        "diffusers TaylorSeer lite": (step_peers.taylorseer, 1, 4),
        "diffusers SeaCache": (step_peers.sea_cache, 0.0, 1e9),
    }.items():
        found[name] = (
            lambda pipe, p=peer, k=never: p(pipe, k, STEPS),
            lambda pipe, p=peer, k=always: p(pipe, k, STEPS),
        )
    return found


class Steps:
    """Times the steps of a run, and knows which of them ran the middle block."""

    def __init__(self, tokens: int) -> None:
        self.pipe = model()
        side = next(side for side in range(int(tokens**0.5), 0, -1) if tokens % side == 0)
        self._latents = torch.randn(1, tokens, CHANNELS)
        self._kwargs = {
            "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH),
            "img_shapes": [[(1, side, tokens // side)]],
            "return_dict": False,
        }
        self._ran = 0
        self.pipe.transformer.transformer_blocks[BLOCKS // 2].attn.to_q.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._ran += 1

    @torch.no_grad()
    def run(self, method: Method) -> tuple[list[float], list[float]]:
        """Seconds of computed and of skipped steps, without the first two and the last."""
        transformer, scheduler = self.pipe.transformer, self.pipe.scheduler
        scheduler.set_timesteps(STEPS)
        computed, skipped, latents = [], [], self._latents
        with method(self.pipe):
            for step, t in enumerate(scheduler.timesteps):
                self._ran, began = 0, time.perf_counter()
                with transformer.cache_context("cond"):
                    velocity = transformer(hidden_states=latents, timestep=t[None] / 1000, **self._kwargs)[0]
                seconds = time.perf_counter() - began
                if 2 <= step < STEPS - 1:
                    (computed if self._ran else skipped).append(seconds)
                latents = scheduler.step(velocity, t, latents)[0]
            if hasattr(transformer, "_reset_stateful_cache"):
                transformer._reset_stateful_cache()
        return computed, skipped


def measure(tokens: int, rounds: int) -> dict[str, dict[str, float | None]]:
    """By method: what a computed step costs more, and what a skipped one costs, as shares of a bare step."""
    steps = Steps(tokens)
    steps.run(lambda pipe: nullcontext())
    table: dict[str, dict[str, float | None]] = {}
    for name, (never, always) in methods().items():
        more: list[float] = []
        left: list[float] = []
        for _ in range(rounds):
            before = statistics.median(steps.run(lambda pipe: nullcontext())[0])
            computed, _unused = steps.run(never)
            after = statistics.median(steps.run(lambda pipe: nullcontext())[0])
            _unused, skipped = steps.run(always)
            if computed:
                more.append(2 * statistics.median(computed) / (before + after) - 1)
            if skipped:
                left.append(statistics.median(skipped) / after)
        table[name] = {
            "computed_overhead": statistics.median(more) if more else None,
            "skipped_share": statistics.median(left) if left else None,
        }
    return table


def main() -> None:
    """Measure, print a table, write `results/step_overhead.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 288], help="noise tokens")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default 9)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # that a cache skips nothing is the point here
    torch.set_num_threads(1)
    results = {}
    for tokens in options.tokens:
        results[tokens] = measure(tokens, options.rounds)
        print(f"\n{BLOCKS} blocks, width {HEADS * HEAD_WIDTH}, {tokens} tokens; shares of a bare step")
        print(f"{'method':34}{'computed step':>16}{'skipped step':>16}")
        for name, row in results[tokens].items():
            values = [row["computed_overhead"], row["skipped_share"]]
            signs = ("+", "")
            print(
                f"{name:34}"
                + "".join(
                    f"{'-':>16}" if value is None else f"{f'{value:{sign}.2%}':>16}"
                    for value, sign in zip(values, signs, strict=True)
                )
            )
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"measured": results, "machine": asdict(describe_machine())}
    (options.out / "step_overhead.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
