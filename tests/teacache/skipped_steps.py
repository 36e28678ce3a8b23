"""TeaCache on a transformer for the length of a `with`, skipping by a known pattern."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tests.denoising import EDIT, Edit, qwen_transformer, velocities

from dittocache.teacache.adapter import TeaCacheAdapter
from dittocache.teacache.config import TeaCacheConfig

STEPS = 8
GUIDED = replace(EDIT, branches=("cond", "uncond"))
# Skips whatever it may: 0 c, 1-3 s, 4 c, 5-6 s, 7 c.
SKIPPING = TeaCacheConfig(
    rel_l1_thresh=1e6, coefficients=(1.0, 0.0), max_consecutive_skips=3, num_inference_steps=STEPS
)
SKIPPED = {1, 2, 3, 5, 6}
EXACT = TeaCacheConfig(rel_l1_thresh=0, num_inference_steps=STEPS)


@contextmanager
def teacache(model: Any, config: TeaCacheConfig) -> Iterator[Any]:
    adapter = TeaCacheAdapter(config)
    hook = adapter.apply(model)
    try:
        yield hook
    finally:
        adapter.remove(model)


def run(config: TeaCacheConfig, edit: Edit = EDIT, steps: int = STEPS, **model: Any) -> dict[str, list[torch.Tensor]]:
    """A run on a fresh model."""
    transformer = qwen_transformer(**model)
    with teacache(transformer, config):
        return velocities(transformer, edit, steps)
