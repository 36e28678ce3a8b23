"""What is done before and after each transformer block, outside of what `torch.compile` makes of it.

A block that was compiled by itself (`block.compile()`, diffusers' `compile_repeated_blocks`) runs its hooks within its
graph: a hook that looks up what is kept for block 7 would make a graph for block 7 alone. So compiled blocks are called
from here, and all of them share their graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

Before = Callable[[int, tuple[Any, ...], dict[str, Any]], dict[str, Any]]
"""Takes the number of a block and its arguments; gives the keyword arguments that it is called with."""
After = Callable[[int, Any], None]
"""Takes the number of a block and what it returned."""


class AroundBlocks:
    """`before` and `after` around every block, until `detach()`."""

    def __init__(self, blocks: Sequence[nn.Module], before: Before, after: After) -> None:
        self._arounds = [_AroundBlock(block, number, before, after) for number, block in enumerate(blocks)]

    def attach(self) -> None:
        """Also where a block was compiled since the last time; costs nothing where nothing has changed."""
        for around in self._arounds:
            around.attach()

    def detach(self) -> None:
        """Leave the blocks as they were."""
        for around in self._arounds:
            around.detach()


class _AroundBlock:
    def __init__(self, block: nn.Module, number: int, before: Before, after: After) -> None:
        self._block: Any = block
        self._number = number
        self._before = before
        self._after = after
        self._compiled: Any = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        found = self._block._compiled_call_impl
        if found is not None and found != self._call:
            self.detach()
            self._compiled, self._block._compiled_call_impl = found, self._call
        elif found is None and not self._handles:
            self._handles = [
                self._block.register_forward_pre_hook(self._pre, with_kwargs=True),
                self._block.register_forward_hook(self._post),
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._block._compiled_call_impl == self._call:  # else it was compiled anew since
            self._block._compiled_call_impl = self._compiled
        self._handles, self._compiled = [], None

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        output = self._compiled(*args, **_without_views(self._before(self._number, args, kwargs)))
        self._after(self._number, output)
        return output

    def _pre(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, self._before(self._number, args, kwargs)

    def _post(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._after(self._number, output)


def _without_views(block_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The two streams as tensors of their own: a linear layer gives the first block views, and the compiler a graph."""
    own = dict(block_kwargs)
    for name in ("hidden_states", "encoder_hidden_states"):
        stream = own.get(name)
        if isinstance(stream, torch.Tensor) and stream._is_view():
            own[name] = stream.clone()
    return own
