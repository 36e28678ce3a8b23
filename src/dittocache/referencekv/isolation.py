"""References that see references only and are modulated at t = 0: their keys and values never change during a run.

Every block is called twice: with the reference tokens alone, then with text and noise tokens, which attend to
everything; the tokens are embedded by two calls too. So the references' K and V depend on the reference pictures and
nothing else, and a step that takes them from a cache makes exactly the calls that it makes without one: the outcome is
the same bit for bit. A model must be fine-tuned with this (`train.reference_visibility: isolated`).

Shapes: B batch, T text tokens, N noise tokens, R reference tokens, D width, H heads, d head width, C output channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.families.denoiser import (
    ISOLATION_HOOK,
    REFERENCE_KV_HOOK,
    find_denoiser,
    installed_hook,
    is_isolated,
    remove_hook,
)
from dittocache.families.registry import adapter_of
from dittocache.families.run_clock import bind_forward
from dittocache.families.transformer_side import TransformerAdapter
from dittocache.referencekv.attention import check_attention
from dittocache.referencekv.isolated_block import OUTSIDE, PASSING, IsolatedAttention, IsolatedBlock, ReferencePass

FEATURE = "isolation of references"
CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")


class SplitEmbedding(ModelHook):  # type: ignore[misc]  # diffusers counts as Any
    """Embeds noise and references apart: a matrix product of fewer rows may round otherwise."""

    def __init__(self, isolation: Isolation) -> None:
        super().__init__()
        self.isolation = isolation

    def new_forward(self, embedder: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """Called by diffusers in place of the embedder's forward; `(B, tokens, C)` to `(B, tokens, D)`."""
        if self.isolation.suspended:
            return cast(torch.Tensor, self.fn_ref.original_forward(hidden_states))
        noise = self.isolation.noise_tokens()
        halves = (hidden_states[:, :noise], hidden_states[:, noise:])
        return torch.cat([self.fn_ref.original_forward(half) for half in halves if half.shape[1]], dim=1)


class Isolation:
    """Isolated references on one transformer, until `remove()` or the end of a `with`."""

    def __init__(self, module: nn.Module, adapter: TransformerAdapter, apart: bool = False) -> None:
        self._module: Any = module
        self._adapter = adapter
        self._apart = apart
        self._isolated: list[IsolatedBlock] = []
        self.suspended = False
        self._passing: ReferencePass | None = None
        self._attention: list[tuple[Any, IsolatedAttention]] = []
        parts: list[Any] = [module, *adapter.blocks(module)]
        self._zero_cond_t = [part for part in parts if getattr(part, "zero_cond_t", False)]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._apply()

    def __enter__(self) -> Isolation:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Put the stock blocks and processors back. Raises ReferenceCacheError while a reference KV cache is on."""
        if installed_hook(self._module, REFERENCE_KV_HOOK) is not None:
            raise ReferenceCacheError("the reference KV cache is on for this transformer; remove it first")
        for handle in self._handles:
            handle.remove()
        for attention, stand_in in self._attention:
            if attention.processor is stand_in:  # else someone has set another since: theirs stays
                attention.set_processor(stand_in.stock)
        for block in self._isolated:
            block.detach()
        embedding = self._adapter.image_embedder(self._module)
        if installed_hook(embedding, ISOLATION_HOOK) is not None:
            remove_hook(embedding, ISOLATION_HOOK)
        for part in self._zero_cond_t:
            part.zero_cond_t = True
        self._handles, self._attention, self._isolated, self._zero_cond_t, self._passing = [], [], [], [], None

    @contextmanager
    def suspend(self) -> Iterator[None]:
        """Within, the transformer computes as if its references had never been isolated."""
        before = self.suspended
        self._suspend(True)
        try:
            yield
        finally:
            self._suspend(before)

    def _suspend(self, suspended: bool) -> None:
        self.suspended = suspended
        for part in self._zero_cond_t:
            part.zero_cond_t = suspended

    def _apply(self) -> None:
        for part in self._zero_cond_t:  # references have a call of their own, at t = 0
            part.zero_cond_t = False
        for attention in self._adapter.attention_modules(self._module):
            stand_in = IsolatedAttention(attention.processor, self._adapter, self)
            attention.set_processor(stand_in)  # type: ignore[operator]
            self._attention.append((attention, stand_in))
        blocks = self._adapter.blocks(self._module)
        for index, (block, (attention, _)) in enumerate(zip(blocks, self._attention, strict=True)):
            last = index == len(blocks) - 1
            self._isolated.append(IsolatedBlock(self, self._adapter, block, attention, index, last))
            self._isolated[-1].attach()
        embedding = self._adapter.image_embedder(self._module)
        HookRegistry.check_if_exists_or_initialize(embedding).register_hook(SplitEmbedding(self), ISOLATION_HOOK)
        embedder = self._adapter.timestep_embedder(self._module)
        self._handles = [
            # Before all hooks of diffusers, those of the caches too: they are given the pass among the arguments.
            self._module.register_forward_pre_hook(self._begin, with_kwargs=True),
            embedder.register_forward_hook(self._embed),
        ]

    def noise_tokens(self) -> int:
        """In the image stream of the call that is under way; ReferenceCacheError where there is none."""
        if self._passing is None:
            raise ReferenceCacheError(OUTSIDE)
        return 0 if self._passing.alone else self._passing.layout.noise

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Any] | None:
        if self.suspended:
            return None
        forward_kwargs = bind_forward(module, args, kwargs)
        layout = self._adapter.token_layout(module, forward_kwargs)
        if layout.reference == 0:
            raise ReferenceCacheError(
                f"references of this {type(module).__name__} are isolated, and this call has none: {layout.noise} "
                "image tokens, all of them noise, or samples of different sizes; isolation is for edits of pictures"
            )
        for name in CONTROLNET:
            if forward_kwargs.get(name) is not None:
                raise ReferenceCacheError(f"{name} would reach the isolated references; use one of them alone")
        parts = self._adapter.reference_lengths(forward_kwargs, layout) if self._apart else (layout.reference,)
        if sum(parts) != layout.reference:
            raise ReferenceCacheError(
                f"{layout.reference} reference tokens do not divide into pictures of {' and '.join(map(str, parts))}; "
                "give all samples of a batch references of the same sizes"
            )
        for block in self._isolated:
            block.attach()
        self._passing = ReferencePass(layout, parts)
        name = self._adapter.attention_kwargs_name
        forward_kwargs[name] = {**(forward_kwargs.get(name) or {}), PASSING: self._passing}
        return (), forward_kwargs

    def _embed(self, embedder: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Here, within the forward: offloading has brought the weights to the device, and autocast is on."""
        passing = self._passing
        if not self.suspended and passing is not None and passing.temb is None and passing.take is None:
            passing.temb = embedder.forward(*self._adapter.reference_conditioning(args))


@contextmanager
def references_in_full(module: nn.Module) -> Iterator[None]:
    """Within, references of this transformer see everything, as in the stock model, whether they are isolated or not.

    Raises ReferenceCacheError while a reference KV cache is on.
    """
    hooks = [hook for part in module.modules() if (hook := installed_hook(part, ISOLATION_HOOK)) is not None]
    isolation: Isolation | None = next((hook.isolation for hook in hooks if isinstance(hook, SplitEmbedding)), None)
    if isolation is None:
        yield
        return
    if installed_hook(module, REFERENCE_KV_HOOK) is not None:
        raise ReferenceCacheError("the reference KV cache is on for this transformer; remove it first")
    with isolation.suspend():
        yield


def isolate_references(target: Any, apart: bool = False) -> Isolation:
    """Let reference tokens see reference tokens only, at t = 0, as a LoRA with isolated references was trained.

    The transformer then returns noise tokens only, `(B, N, C)`: the part of its output that pipelines use. A LoRA may
    be loaded before or after, blocks compiled before or after. The reference KV cache of such a model is exact.

    Args:
        target: a diffusers pipeline with a transformer, or the transformer.
        apart: each reference sees itself only, as Qwen-Image-Edit-Causal was trained; else all of a sample see each
            other.

    Returns the isolation: it lasts until its `remove()`, or to the end of `with isolate_references(pipe):`.

    Raises ReferenceCacheError where the model is not supported, caches are on, or references are isolated already;
    ModelError where there is no transformer.
    """
    module = find_denoiser(target).module
    try:
        adapter = adapter_of(module)
    except ModelError as error:
        raise ReferenceCacheError(f"references cannot be isolated: {error}") from error
    if is_isolated(module):
        raise ReferenceCacheError(f"references of this {type(module).__name__} are isolated already")
    if installed_hook(module, "dittocache_session") is not None:
        raise ReferenceCacheError("caches of dittocache are on for this transformer; isolate its references before")
    check_attention(module, adapter, FEATURE)
    return Isolation(module, adapter, apart)
