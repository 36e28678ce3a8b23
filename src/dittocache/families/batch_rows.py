"""A forward pass for some samples of its batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch


def batch_rows(
    forward_kwargs: Mapping[str, Any], rows: Sequence[int], entries: Collection[str], whole: Collection[str]
) -> dict[str, Any] | None:
    """The arguments cut to `rows`, in this order.

    Tensors, and lists of tensors such as ControlNet residuals, are cut along their first axis. None where one of them
    has not as many rows as `hidden_states`.

    Args:
        entries: names of lists with an entry for each sample.
        whole: names of arguments that all samples share.
    """
    samples = len(forward_kwargs["hidden_states"])
    index = list(rows)
    cut: dict[str, Any] = {}
    for name, value in forward_kwargs.items():
        if name in whole or value is None or isinstance(value, bool | int | float | str):
            cut[name] = value
        elif name in entries and len(value) == samples:
            cut[name] = [value[row] for row in index]
        elif isinstance(value, torch.Tensor) and value.ndim and len(value) == samples:
            cut[name] = value[index]
        elif _are_tensors(value, samples):
            cut[name] = [one[index] for one in value]
        else:
            return None
    return cut


def _are_tensors(value: Any, samples: int) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(one, torch.Tensor) and one.ndim and len(one) == samples for one in value
    )
