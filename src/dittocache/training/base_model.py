"""The model itself, without its LoRA and with full visibility: a target to train isolated references to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dittocache.families.base import TrainingInputs
from dittocache.referencekv.isolation import references_in_full
from dittocache.training.loss import predicted_velocity


@contextmanager
def as_base_model(transformer: Any) -> Iterator[None]:
    """Within, `transformer` is the stock model: adapters are off and references see everything."""
    transformer.disable_adapters()
    try:
        with references_in_full(transformer):
            yield
    finally:
        transformer.enable_adapters()


@torch.no_grad()
def base_velocity(transformer: Any, inputs: TrainingInputs, dtype: torch.dtype) -> torch.Tensor:
    """The stock model's velocity `(B, N, C)` float32 for these inputs, run in `dtype`; nothing is kept for gradients.

    Args:
        transformer: the bare transformer with its LoRA, not the wrapper of several processes.
    """
    with as_base_model(transformer):
        return predicted_velocity(transformer, inputs, dtype).float()


def mixed_target(inputs: TrainingInputs, base: torch.Tensor, share: float) -> torch.Tensor:
    """The target `(B, N, C)` of which `share` is the base model's velocity and the rest that of the data.

    Its squared error has the gradient of the two errors added up in these shares.
    """
    return share * base + (1 - share) * inputs.target.float()
