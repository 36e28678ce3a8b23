"""Denoising runs of transformers that are only sampled from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from tests.denoising import sigmas
from tests.sampled_models import Model, latents

from dittocache.families.registry import step_adapter_of
from dittocache.sampling.trace import Trace
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.outputs import sample_of

STEPS = 8
PATTERN = "c...c..c"  # of SKIPPING
SKIPPING = TeaCacheConfig(
    rel_l1_thresh=1e6, coefficients=(1.0, 0.0), max_consecutive_skips=3, num_inference_steps=STEPS
)
SCHEDULE = TeaCacheConfig(gate="schedule", schedule=(0, 1, 4), num_inference_steps=STEPS)
EXACT = [
    TeaCacheConfig(rel_l1_thresh=0, num_inference_steps=STEPS),
    TeaCacheConfig(gate="error", error_tolerance=0, num_inference_steps=STEPS),
]


def noise_of(found: Any, layout: Any, transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The noise's part of a return value, of a computed or of a skipped step."""
    sample = sample_of(found)
    adapter = step_adapter_of(transformer)
    assert adapter is not None
    return sample if sample.shape[1] == layout.noise else adapter.noise_tokens(sample, layout, kwargs)


def path(samples: int = 1, steps: int = STEPS, seed: int = 1) -> Iterator[tuple[torch.Tensor, float]]:
    """Latents and sigma of each step; they move on a path of their own."""
    start, drift = latents(samples, seed), latents(samples, seed + 20)
    for step, sigma in enumerate(sigmas(steps)):
        yield start - drift * (step * (1 + step % 3)) / steps, sigma


def denoise(
    transformer: Any, model: Model, branches: tuple[str, ...] = ("cond",), samples: int = 1, seed: int = 1, **extra: Any
) -> list[torch.Tensor]:
    """What a run returns, noise only, all branches of a step one after the other."""
    adapter, found = step_adapter_of(transformer), []
    assert adapter is not None
    with torch.no_grad():
        for now, sigma in path(samples, seed=seed):
            for branch in branches:
                kwargs = {**model.kwargs(now, sigma, branch), **extra}
                with transformer.cache_context(branch) if len(branches) > 1 else nullcontext():
                    output = transformer(**kwargs)
                found.append(noise_of(output, adapter.token_layout(transformer, kwargs), transformer, kwargs))
    return found


def pattern(trace: Trace) -> str:
    return "".join("c" if record.decision == "computed" else "." for record in trace.steps)
