"""Weights that diffusers' group offloading keeps elsewhere, brought in for layers that are called by themselves.

Offloading brings weights in when a block, or the whole model, is called. On a skipped step neither is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from dittocache.families.denoiser import installed_hook

_GROUP_OFFLOADING = "group_offloading"  # diffusers' name of its hook


@contextmanager
def brought_in(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The weights in the groups of `modules` are where they are computed with."""
    hooks = [installed_hook(module, _GROUP_OFFLOADING) for module in modules]
    groups: dict[int, Any] = {id(hook.group): hook.group for hook in hooks if hook is not None}
    try:
        for group in groups.values():
            group.onload_()
            if group.stream is not None:
                group.stream.synchronize()
        yield
    finally:
        for group in groups.values():
            group.offload_()
