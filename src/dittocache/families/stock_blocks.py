"""The block stack of a stock diffusers transformer, run by its own forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn


def run_stock_blocks(module: nn.Module, final_norm: nn.Module, forward_kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What the blocks hand to `final_norm`, `(B, tokens, D)`.

    The class's own forward runs, beneath any hook on `module`; so the result is the stock one for every argument.
    """
    found: list[torch.Tensor] = []
    handle = final_norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        cast(Any, type(module).forward)(module, **forward_kwargs)
    finally:
        handle.remove()
    return found[0]
