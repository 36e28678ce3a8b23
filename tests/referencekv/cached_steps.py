"""The reference cache on a transformer for the length of a `with`, and a step taken twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.hook import ReferenceKVHook, apply_reference_kv, remove_reference_kv

FROZEN = ReferenceKVConfig(refresh=(0,))


@contextmanager
def reference_kv(target: Any, config: ReferenceKVConfig = FROZEN) -> Iterator[ReferenceKVHook]:
    hook = apply_reference_kv(target, config)
    try:
        yield hook
    finally:
        remove_reference_kv(target)


def twice(model: Any, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same input as two steps of a run."""
    outputs = []
    for step in range(2):
        with model.cache_context("cond", step_index=step, num_inference_steps=4):
            outputs.append(model(**kwargs)[0])
    return outputs[0], outputs[1]
