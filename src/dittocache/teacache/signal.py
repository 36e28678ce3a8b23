"""How far a tensor is from another, sample by sample, with one read from the device."""

from __future__ import annotations

import torch

from dittocache.teacache.ranks import OverRanks


def relative_distance(
    current: torch.Tensor, reference: torch.Tensor, over_ranks: OverRanks | None = None
) -> torch.Tensor:
    """mean|x - reference| / mean|reference| of each row of `(B, ...)`, `(B,)` float32 on the device.

    With `over_ranks` both means are those of the tokens of all ranks.
    """
    current, reference = current.detach().float().flatten(1), reference.detach().float().flatten(1)
    change, size = (current - reference).abs().mean(dim=1), reference.abs().mean(dim=1)
    if over_ranks is not None:
        change, size = over_ranks(torch.stack([change, size]))
    return change / size


def relative_l1(current: torch.Tensor, previous: torch.Tensor, over_ranks: OverRanks | None = None) -> list[float]:
    """TeaCache's mean|x_t - x_prev| / mean|x_prev| of each row, in float32; tensors `(B, N, D)` of one shape.

    The only read from the device that the gate needs in a step: all rows in one. Not finite where `previous` is all
    zeros or either tensor is not finite; NaN where the shapes differ.
    """
    if current.shape != previous.shape:
        return [float("nan")] * current.shape[0]
    return read(relative_distance(current, previous, over_ranks))


def read(numbers: torch.Tensor) -> list[float]:
    """The values of a tensor `(B,)`, in one read from the device."""
    found: list[float] = [float(numbers)] if numbers.numel() == 1 else numbers.tolist()
    return found
