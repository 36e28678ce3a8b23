"""The reference-image KV cache on a stock diffusers transformer.

A full step runs all tokens and keeps K and V of the references, block by block. A cached step runs noise and text
tokens; every block attends to the kept keys and values in the references' place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.families.base import JointQKV, TokenLayout, TransformerAdapter
from dittocache.families.denoiser import REFERENCE_KV_HOOK, find_denoiser, installed_hook, is_isolated, remove_hook
from dittocache.families.registry import adapter_of
from dittocache.families.run_clock import BranchListener, RunClock, bind_forward
from dittocache.referencekv.attention import ReferenceAttention, check_attention
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.isolation import PASSING, ReferencePass
from dittocache.referencekv.policy import refresh_now
from dittocache.referencekv.store import BranchKV, RunKV

HOOK_NAME = REFERENCE_KV_HOOK


class ReferenceKVHook(ModelHook):  # type: ignore[misc]  # diffusers counts as Any
    """Runs reference tokens only when the policy says so.

    A full step returns what the forward within returns, untouched; a cached step returns noise tokens only,
    `(B, N, C)`: the part of the output that pipelines use.

    Args:
        config: the settings.
        adapter: the model's transformer side.
        clock: tells runs, branches and steps apart; shared with other hooks on the same transformer.
    """

    _is_stateful = True

    def __init__(self, config: ReferenceKVConfig, adapter: TransformerAdapter, clock: RunClock) -> None:
        super().__init__()
        self.branch_listener = BranchListener()
        self._config = config
        self._adapter = adapter
        self._clock = clock
        self._kept = RunKV(0)
        self._filling: BranchKV | None = None
        self._reading: BranchKV | None = None
        self._layout = TokenLayout(0, 0)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._attention: list[tuple[Any, ReferenceAttention]] = []
        self._isolated = False

    @property
    def bytes_held(self) -> int:
        """Device memory of kept keys and values."""
        return self._kept.bytes_held

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when the hook is registered: stands in for every attention processor.

        Blocks with isolated references give and take keys and values by themselves.
        """
        modules: list[Any] = list(self._adapter.attention_modules(module))
        self._kept = RunKV(len(modules))
        self._isolated = is_isolated(module)
        if self._isolated:
            return module
        for block, attention in enumerate(modules):
            stand_in = ReferenceAttention(
                attention.processor, block, self._adapter, self._exchange, self._runs_stock_attention
            )
            attention.set_processor(stand_in)
            self._attention.append((attention, stand_in))
        self._handles = [
            block.register_forward_pre_hook(self._cut_block, with_kwargs=True) for block in self._adapter.blocks(module)
        ]
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers (which spells it so) when the hook is removed: puts the processors back."""
        self._kept.clear()
        for handle in self._handles:
            handle.remove()
        for attention, stand_in in self._attention:
            if attention.processor is stand_in:  # else someone has set another since: theirs stays
                attention.set_processor(stand_in.stock)
        self._handles, self._attention = [], []
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget everything; called by diffusers at the end of a pipeline's call."""
        self._kept.clear()
        self._clock.end_run()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers in place of the transformer's forward."""
        forward_kwargs = bind_forward(module, args, kwargs)
        with self._clock.call(module, self.branch_listener.heard, forward_kwargs) as call:
            layout = self._adapter.token_layout(module, forward_kwargs)
            if layout.reference == 0:
                raise ReferenceCacheError(
                    f"this run of {type(module).__name__} has no reference tokens: {layout.noise} image tokens, all "
                    "of them noise. The reference KV cache is for edits of pictures; leave it off here"
                )
            if not self._kept.knows(call.run):
                self._kept.clear(but=self._clock.runs_under_way)
            try:
                branch = self._kept.branch(call.run, call.branch)
                full = refresh_now(self._config.refresh, branch.reused)
                call.references = "computed" if full else "reused"
                return (self._full if full else self._cached)(branch, forward_kwargs, layout)
            except BaseException:
                # Slots that are half filled, or filled by a step that failed later.
                self._kept.clear(but=self._clock.runs_under_way - {call.run})
                raise

    def _full(self, branch: BranchKV, forward_kwargs: dict[str, Any], layout: TokenLayout) -> Any:
        if self._config.refresh == 1:  # nothing that is kept would be read
            branch.reused = 0
            return self.fn_ref.original_forward(**forward_kwargs)
        branch.begin_filling()
        if self._isolated:
            self._passing(forward_kwargs).keep = branch.put
        with self._step(layout, filling=branch):
            output = self.fn_ref.original_forward(**forward_kwargs)
        branch.filled()
        return output

    def _cached(self, branch: BranchKV, forward_kwargs: dict[str, Any], layout: TokenLayout) -> Any:
        if self._isolated:
            self._passing(forward_kwargs).take = branch.take
        with self._step(layout, reading=branch):
            output = self.fn_ref.original_forward(**self._adapter.noise_only(forward_kwargs, layout))
        branch.reused = (branch.reused or 0) + 1
        return output

    @contextmanager
    def _step(
        self, layout: TokenLayout, filling: BranchKV | None = None, reading: BranchKV | None = None
    ) -> Iterator[None]:
        """What the blocks do during this step; nothing here or in them waits for the device."""
        self._layout, self._filling, self._reading = layout, filling, reading
        try:
            yield
        finally:
            self._filling = self._reading = None

    def _passing(self, forward_kwargs: dict[str, Any]) -> ReferencePass:
        """What the isolation has put among the arguments of this call."""
        passing: ReferencePass = forward_kwargs[self._adapter.attention_kwargs_name][PASSING]
        return passing

    def _runs_stock_attention(self) -> bool:
        return self._filling is None and self._reading is None

    def _exchange(self, block: int, joint: JointQKV) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that block number `block` attends to, references last."""
        if self._reading is not None:
            key, value = self._reading.take(block)
            return torch.cat([joint.key, key], dim=1), torch.cat([joint.value, value], dim=1)
        if self._filling is not None:
            first = joint.key.shape[1] - self._layout.reference
            self._filling.put(block, joint.key[:, first:], joint.value[:, first:])
        return joint.key, joint.value

    def _cut_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """On a cached step the forward still makes positions and modulation for all image tokens: cut them."""
        if self._reading is None:
            return None
        if args:
            raise ReferenceCacheError(
                f"{type(block).__name__} was called with positional arguments, as gradient checkpointing does; the "
                "reference KV cache is for sampling: run it under torch.no_grad()"
            )
        return args, self._adapter.noise_only_block(kwargs, self._layout)


def apply_reference_kv(target: Any, config: ReferenceKVConfig, clock: RunClock | None = None) -> ReferenceKVHook:
    """Put the reference KV cache on a pipeline or a bare transformer.

    Args:
        target: a diffusers pipeline with a transformer, or the transformer.
        config: the settings.
        clock: shared with other hooks on the transformer; its own by default.

    Raises ReferenceCacheError where the model is not supported or the cache is on already, and ModelError where there
    is no transformer.
    """
    denoiser = find_denoiser(target)
    try:
        adapter = adapter_of(denoiser.module)
    except ModelError as error:
        raise ReferenceCacheError(f"the reference KV cache cannot be applied: {error}") from error
    if installed_hook(denoiser.module, HOOK_NAME) is not None:
        raise ReferenceCacheError(
            f"the reference KV cache is on for this {type(denoiser.module).__name__} already; "
            "remove it before applying it again"
        )
    if not is_isolated(denoiser.module):
        check_attention(denoiser.module, adapter, "the reference KV cache")
    hook = ReferenceKVHook(config, adapter, clock or RunClock(adapter, denoiser.scheduler))
    HookRegistry.check_if_exists_or_initialize(denoiser.module).register_hook(hook, HOOK_NAME)
    return hook


def remove_reference_kv(target: Any) -> None:
    """Take the reference KV cache off and put the stock attention processors back."""
    remove_hook(find_denoiser(target).module, HOOK_NAME)
