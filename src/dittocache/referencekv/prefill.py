"""Isolated references, computed by themselves before the first step that needs them: all steps have one shape.

The blocks are called for them as they are called in an uncached step, so that the outcome is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dittocache.referencekv.isolated_block import ReferencePass
from dittocache.referencekv.storage import ReferenceSource

Keep = Callable[[int, torch.Tensor, torch.Tensor, ReferenceSource], None]


def prefill(passing: ReferencePass, forward_kwargs: Mapping[str, Any], keep: Keep, forward: Callable[..., Any]) -> None:
    """Run the references of one call through the transformer, and nothing else.

    Args:
        passing: what the isolation has put among the arguments of this call.
        forward_kwargs: of this call.
        keep: is given (block, K, V, what they are computed from) of every block.
        forward: the transformer's.
    """
    layout = passing.layout
    tokens = forward_kwargs["hidden_states"][:, layout.noise : layout.noise + layout.reference]  # (B, R, C)
    passing.alone, passing.keep = True, keep
    try:
        forward(**{**forward_kwargs, "hidden_states": tokens})
    finally:
        passing.alone, passing.keep = False, None
