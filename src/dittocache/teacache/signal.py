"""How far a tensor is from another, sample by sample, with one read from the device."""

from __future__ import annotations

import torch


def relative_distance(current: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """mean|x - reference| / mean|reference| of each row of `(B, ...)`, `(B,)` float32 on the device."""
    current, reference = current.detach().float().flatten(1), reference.detach().float().flatten(1)
    return (current - reference).abs().mean(dim=1) / reference.abs().mean(dim=1)


def relative_l1(current: torch.Tensor, previous: torch.Tensor) -> list[float]:
    """TeaCache's mean|x_t - x_prev| / mean|x_prev| of each row, in float32; tensors `(B, N, D)` of one shape.

    The only read from the device that the gate needs in a step: all rows in one. Not finite where `previous` is all
    zeros or either tensor is not finite; NaN where the shapes differ.
    """
    if current.shape != previous.shape:
        return [float("nan")] * current.shape[0]
    return read(relative_distance(current, previous))


def read(numbers: torch.Tensor) -> list[float]:
    """The values of a tensor `(B,)`, in one read from the device."""
    found: list[float] = [float(numbers)] if numbers.numel() == 1 else numbers.tolist()
    return found
