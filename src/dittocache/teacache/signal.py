"""How far the input of the block stack moved from one step to the next."""

from __future__ import annotations

import torch


def relative_l1(current: torch.Tensor, previous: torch.Tensor) -> float:
    """mean|x_t - x_prev| / mean|x_prev| in float32; tensors `(B, N, D)` of one shape.

    The only read from the device that a step cache needs: both means become one scalar there. Not finite where
    `previous` is all zeros or either tensor is not finite; NaN where the shapes differ.
    """
    if current.shape != previous.shape:
        return float("nan")
    current, previous = current.detach().float(), previous.float()
    return float((current - previous).abs().mean() / previous.abs().mean())
