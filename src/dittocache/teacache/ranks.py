"""One decision on all ranks of a context-parallel transformer, of which each may measure a part of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

OverRanks = Callable[[torch.Tensor], torch.Tensor]


def context_parallel(module: nn.Module) -> Any:
    """diffusers' context-parallel settings of `module`, None where its tokens are all on one device."""
    config = getattr(module, "_parallel_config", None)
    return None if config is None else config.context_parallel_config


def over_ranks(module: nn.Module) -> OverRanks | None:
    """Averages a tensor of numbers over the ranks that `module` runs on; None where there is one, or all have all."""
    config = context_parallel(module)
    if config is None:
        return None
    import torch.distributed as dist

    group = config._flattened_mesh.get_group()
    count = dist.get_world_size(group)
    if count == 1:
        return None

    def mean(numbers: torch.Tensor) -> torch.Tensor:
        total = numbers.clone()
        dist.all_reduce(total, group=group)
        return total / count

    return mean


def gathered(module: nn.Module, stream: torch.Tensor, tokens: int) -> torch.Tensor:
    """`stream` `(B, tokens, D)` with the tokens of all ranks; as it is where it has that many already."""
    config = context_parallel(module)
    if config is None or stream.shape[1] == tokens:
        return stream
    from diffusers.hooks.context_parallel import EquipartitionSharder, PartitionAnythingSharder

    if config.ulysses_anything or config.ring_anything:
        whole = PartitionAnythingSharder.unshard_anything(stream, 1, config._flattened_mesh)
    else:
        whole = EquipartitionSharder.unshard(stream, 1, config._flattened_mesh)
    found: torch.Tensor = whole
    return found
