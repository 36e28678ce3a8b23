"""The reference-image KV cache on a stock diffusers transformer.

A full step runs all tokens and keeps K and V of the references, block by block. A cached step runs noise and text
tokens; every block attends to the kept keys and values in the references' place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.families.denoiser import REFERENCE_KV_HOOK, find_denoiser, installed_hook, is_isolated, remove_hook
from dittocache.families.registry import adapter_of
from dittocache.families.run_clock import BranchListener, DenoisingCall, RunClock, bind_forward
from dittocache.families.transformer_side import TokenLayout, TransformerAdapter
from dittocache.referencekv.attention import ReferenceAttention, check_attention, source_of
from dittocache.referencekv.blocks import AroundBlocks
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.identity import ReferenceIdentity
from dittocache.referencekv.isolated_block import PASSING, ReferencePass
from dittocache.referencekv.isolation import CONTROLNET, isolate_references
from dittocache.referencekv.policy import EXACT, refresh_now
from dittocache.referencekv.prediction import BranchReferences
from dittocache.referencekv.prefill import prefill
from dittocache.referencekv.rules import check_adapters, check_settings, lora_visibility, rule_of, trained_visibility
from dittocache.referencekv.store import RunKV

logger = logging.getLogger(__name__)

HOOK_NAME = REFERENCE_KV_HOOK
CHANGED = (
    "the reference pictures changed in the middle of a denoising run, so they were computed anew; loops that take "
    "turns on one transformer say which request each step is for: wrap it in dittocache.request"
)


class ReferenceKVHook(ModelHook):  # type: ignore[misc]  # diffusers counts as Any
    """Runs reference tokens only when the policy says so.

    A full step returns what the forward within returns, untouched; a cached step returns noise tokens only,
    `(B, N, C)`: the part of the output that pipelines use.

    Args:
        config: the settings.
        adapter: the model's transformer side.
        clock: tells runs, branches and steps apart; shared with other hooks on the same transformer.
        by_hand: the transformer is called without a pipeline, whose loop the device is waited for at every step anyway.
        say: takes a remark for the user, at most once each.

    Attributes:
        config: the settings.
        enabled: False: every step is the stock one, and nothing is kept.
        isolation: ends with the cache, where that isolated the references itself.
    """

    _is_stateful = True

    def __init__(
        self,
        config: ReferenceKVConfig,
        adapter: TransformerAdapter,
        clock: RunClock,
        by_hand: bool = False,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        super().__init__()
        self.branch_listener = BranchListener()
        self.enabled = True
        self.isolation = ExitStack()
        self.isolated_by_cache = False
        self.config = config
        self._adapter = adapter
        self._clock = clock
        self._by_hand = by_hand
        self._say = say
        self._said: set[str] = set()
        self._kept = RunKV(0)
        self._branches: dict[tuple[int, str], BranchReferences] = {}
        self._filling: BranchReferences | None = None
        self._reading: BranchReferences | None = None
        self._layout = TokenLayout(0, 0)
        self._around = AroundBlocks((), self._before_block, self._after_block)
        self._attention: list[tuple[Any, ReferenceAttention]] = []
        self._isolated = False
        self._blocks = 0
        self._first_kept = config.freeze_from_layer or 0

    @property
    def bytes_held(self) -> int:
        """Device memory of kept keys and values."""
        return self._kept.bytes_held

    @property
    def host_bytes_held(self) -> int:
        """Memory on the host of those that are offloaded."""
        return self._kept.host_bytes_held

    @property
    def bytes_predicted(self) -> int:
        """Most device memory that they were expected to take, when they were about to be kept."""
        return self._kept.predicted_bytes

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when the hook is registered: stands in for every attention processor.

        Blocks with isolated references give and take keys and values by themselves.
        """
        modules: list[Any] = list(self._adapter.attention_modules(module))
        self._blocks = len(modules)
        self._kept = RunKV(self._blocks, self.config, self._adapter.reference_is_exact(module), self._say)
        self._isolated = is_isolated(module)
        if self._isolated:
            return module
        for attention in modules:
            stand_in = ReferenceAttention(attention.processor, self._adapter)
            attention.set_processor(stand_in)
            self._attention.append((attention, stand_in))
        self._around = AroundBlocks(self._adapter.blocks(module), self._before_block, self._after_block)
        self._around.attach()
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers (which spells it so) when the hook is removed: puts the processors back."""
        self.forget()
        self._around.detach()
        for attention, stand_in in self._attention:
            if attention.processor is stand_in:  # else someone has set another since: theirs stays
                attention.set_processor(stand_in.stock)
        self._attention = []
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the call; called by diffusers at the end of a pipeline's call."""
        self.forget(shared_too=not self.config.reuse_across_calls)
        self._clock.end_run()
        return module

    def forget(self, but: Collection[int] = (), shared_too: bool = True) -> None:
        """Free what is kept, all of it or that of all runs but some.

        Args:
            shared_too: False: exact references stay for a later call with the same ones.
        """
        self._branches = {key: branch for key, branch in self._branches.items() if key[0] in but}
        self._kept.clear(but, shared_too)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers in place of the transformer's forward."""
        forward_kwargs = bind_forward(module, args, kwargs)
        if not self.enabled:
            return self.fn_ref.original_forward(**forward_kwargs)
        with self._clock.call(module, self.branch_listener.heard, forward_kwargs) as call:
            layout = self._adapter.token_layout(module, forward_kwargs)
            self._check(module, forward_kwargs, layout)
            if not any(run == call.run for run, _ in self._branches):
                self.forget(self._clock.runs_under_way, shared_too=not self.config.reuse_across_calls)
            try:
                return self._step(module, call, forward_kwargs, layout)
            except BaseException:
                # Slots that are half filled, or filled by a step that failed later.
                self.forget(but=self._clock.runs_under_way - {call.run})
                raise

    def _check(self, module: nn.Module, forward_kwargs: dict[str, Any], layout: TokenLayout) -> None:
        """Raise ReferenceCacheError for a call that the cache is not for."""
        if layout.reference == 0:
            raise ReferenceCacheError(
                f"this run of {type(module).__name__} has no reference tokens: {layout.noise} image tokens, all of "
                "them noise. The reference KV cache is for edits of pictures; leave it off here"
            )
        for name in CONTROLNET if self._first_kept else ():
            if forward_kwargs.get(name) is not None:
                raise ReferenceCacheError(f"{name} fit all layers or none; leave freeze_from_layer out beside them")

    def _step(self, module: nn.Module, call: DenoisingCall, forward_kwargs: dict[str, Any], layout: TokenLayout) -> Any:
        key = call.run, call.branch
        references = forward_kwargs["hidden_states"][:, layout.noise : layout.noise + layout.reference]  # (B, R, C)
        branch = self._branches.get(key)
        if branch is not None:
            branch.watch.settle()
        if branch is not None and branch.is_filled and not branch.watch.holds(references, self._by_hand):
            self._say_once(CHANGED)
            branch = None
        if branch is None:
            branch = self._branches[key] = self._new_branch(module, call, forward_kwargs, layout)
            if branch.is_filled:
                branch.watch.keep(references)
        if branch.rule.never_reuses:  # nothing that is kept would be read
            call.references = "computed"
            return self.fn_ref.original_forward(**forward_kwargs)
        sigma = self._clock.sigmas()[0] if branch.rule.needs_sigma else 0.0
        full = refresh_now(branch.rule, call.step, branch.since(sigma))
        call.references = "computed" if full else "reused"
        if not full:
            call.saved = self._share(forward_kwargs, layout)
            return self._cached(branch, forward_kwargs, layout, sigma)
        branch.watch.keep(references)
        output = self._full(branch, forward_kwargs, layout, call.step, sigma)
        call.drift = branch.drift
        return output

    def _new_branch(
        self, module: nn.Module, call: DenoisingCall, forward_kwargs: dict[str, Any], layout: TokenLayout
    ) -> BranchReferences:
        """A branch that keeps nothing; exact references may have been kept for another one before."""
        check_adapters(self.config, module, self._isolated, self.isolated_by_cache)
        rule = rule_of(self.config, call.steps, self._adapter.reference_is_exact(module))
        blocks = range(self._first_kept, self._blocks)
        if self._isolated and rule == EXACT:
            identity = ReferenceIdentity.of(module, self._adapter, forward_kwargs, layout, own=PASSING)
            return BranchReferences(rule, self._kept.shared(call.run, call.branch, identity), None, blocks)
        newest = self._kept.branch(call.run, call.branch)
        older = self._kept.branch(call.run, f"{call.branch}, before") if rule.extrapolate else None
        newest.begin_filling()
        return BranchReferences(rule, newest, older, blocks)

    def _share(self, forward_kwargs: dict[str, Any], layout: TokenLayout) -> float:
        """Share of the blocks' work that a cached step is spared: that of the references among all tokens."""
        text = forward_kwargs.get("encoder_hidden_states")
        tokens = layout.noise + layout.reference + (0 if text is None else text.shape[1])
        return layout.reference / tokens * (1 - self._first_kept / self._blocks)

    def _full(
        self, branch: BranchReferences, forward_kwargs: dict[str, Any], layout: TokenLayout, step: int, sigma: float
    ) -> Any:
        branch.begin_filling(step, sigma)
        if self._isolated and branch.rule == EXACT:
            prefill(self._passing(forward_kwargs), forward_kwargs, branch.put, self.fn_ref.original_forward)
            branch.filled()
            return self._read(branch, forward_kwargs, layout)
        if self._isolated:
            self._passing(forward_kwargs).keep = branch.put
        with self._running(layout, filling=branch):
            output = self.fn_ref.original_forward(**forward_kwargs)
        branch.filled()
        return output

    def _cached(
        self, branch: BranchReferences, forward_kwargs: dict[str, Any], layout: TokenLayout, sigma: float
    ) -> Any:
        branch.aim(sigma)
        output = self._read(branch, forward_kwargs, layout)
        branch.reuse()
        return output

    def _read(self, branch: BranchReferences, forward_kwargs: dict[str, Any], layout: TokenLayout) -> Any:
        """Run text and noise on what is kept."""
        if self._isolated:
            self._passing(forward_kwargs).take = branch.take
        if self._first_kept == 0:
            forward_kwargs = self._adapter.noise_only(forward_kwargs, layout)
        with self._running(layout, reading=branch):
            return self.fn_ref.original_forward(**forward_kwargs)

    @contextmanager
    def _running(
        self, layout: TokenLayout, filling: BranchReferences | None = None, reading: BranchReferences | None = None
    ) -> Iterator[None]:
        """What the blocks do during this step; nothing here or in them waits for the device."""
        self._around.attach()
        self._layout, self._filling, self._reading = layout, filling, reading
        try:
            yield
        finally:
            self._filling = self._reading = None
            for _, stand_in in self._attention:
                stand_in.rest()

    def _before_block(self, number: int, args: tuple[Any, ...], block_kwargs: dict[str, Any]) -> dict[str, Any]:
        if number < self._first_kept:
            return block_kwargs
        _, attention = self._attention[number]
        if self._filling is not None:
            attention.leaves = self._layout.reference
            attention.leaves_input = self.config.storage == "modulated_input"
        if self._reading is None:
            return block_kwargs
        if args:
            raise ReferenceCacheError(
                "a block was called with positional arguments, as gradient checkpointing does; the reference KV cache "
                "is for sampling: run it under torch.no_grad()"
            )
        attention.given = self._reading.take(number)
        if number == self._first_kept > 0:  # references came as far as here
            block_kwargs = {**block_kwargs, "hidden_states": block_kwargs["hidden_states"][:, : self._layout.noise]}
        # The forward still makes positions and modulation for all image tokens.
        return self._adapter.noise_only_block(block_kwargs, self._layout)

    def _after_block(self, number: int, output: Any) -> None:
        module, attention = self._attention[number]
        if self._filling is not None and attention.left is not None:
            given = attention.left_input
            source = None if given is None else source_of(self._adapter, module, given, (self._layout.reference,))
            self._filling.put(number, *attention.left, source)
        attention.rest()

    def _passing(self, forward_kwargs: dict[str, Any]) -> ReferencePass:
        """What the isolation has put among the arguments of this call."""
        passing: ReferencePass = forward_kwargs[self._adapter.attention_kwargs_name][PASSING]
        return passing

    def _say_once(self, remark: str) -> None:
        if remark not in self._said:
            self._said.add(remark)
            self._say(remark)


def apply_reference_kv(
    target: Any,
    config: ReferenceKVConfig,
    clock: RunClock | None = None,
    say: Callable[[str], None] = logger.warning,
) -> ReferenceKVHook:
    """Put the reference KV cache on a diffusers pipeline or transformer, until `remove_reference_kv`.

    Args:
        clock: shared with other hooks on the same transformer; a new one when left out.
        say: takes remarks for the user; the log when left out.

    Raises ReferenceCacheError where the model is not supported, has the cache already, or `mode: exact` would not be
    exact; ModelError where there is no transformer.
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
    with ExitStack() as undo:
        visibility = None if config.mode == "approx" else trained_visibility(denoiser.module)
        isolated_here = visibility is not None and not is_isolated(denoiser.module)
        if isolated_here:
            undo.enter_context(isolate_references(denoiser.module, apart=visibility == "apart"))
            trained = "this checkpoint" if lora_visibility(denoiser.module) is None else "its LoRA"
            say(f"references are isolated while their cache is on ({visibility}): {trained} was trained so")
        check_settings(config, adapter, denoiser.module)
        if not is_isolated(denoiser.module):
            check_attention(denoiser.module, adapter, "the reference KV cache")
        by_hand = denoiser.scheduler is None
        hook = ReferenceKVHook(config, adapter, clock or RunClock(adapter, denoiser.scheduler), by_hand, say)
        HookRegistry.check_if_exists_or_initialize(denoiser.module).register_hook(hook, HOOK_NAME)
        hook.isolated_by_cache = isolated_here
        hook.isolation = undo.pop_all()
    return hook


def remove_reference_kv(target: Any) -> None:
    """Take the reference KV cache off and put the stock attention processors back."""
    module = find_denoiser(target).module
    hook: ReferenceKVHook | None = installed_hook(module, HOOK_NAME)
    remove_hook(module, HOOK_NAME)
    if hook is not None:
        hook.isolation.close()
