"""References that see references only and are modulated at t = 0: their keys and values never change during a run.

Every block is called twice: with the reference tokens alone, then with text and noise tokens, which attend to
everything; the tokens are embedded by two calls too. So the references' K and V depend on the reference pictures and
nothing else, and a step that takes them from a cache makes exactly the calls that it makes without one: the outcome is
the same bit for bit. A model must be fine-tuned with this (`train.reference_visibility: isolated`).

Shapes: B batch, T text tokens, N noise tokens, R reference tokens, D width, H heads, d head width, C output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.families.base import TokenLayout, TransformerAdapter
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
from dittocache.referencekv.attention import AttentionStandIn, ReferenceInput, check_attention, key_mask, source_of
from dittocache.referencekv.storage import KeyValue, ReferenceSource

PASSING = "reference_pass"  # among the attention arguments, on the way from the transformer's door to its blocks
KEPT = "reference_keys"  # the same, from a block to its attention
FEATURE = "isolation of references"
CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")


@dataclass
class ReferencePass:
    """What one forward pass does about its references.

    It travels among the arguments, so that gradient checkpointing finds it again.

    Attributes:
        layout: noise and reference tokens.
        parts: numbers of reference tokens that see each other: one, or one for each picture.
        temb: timestep embedding of the references, `(B, D)`: t = 0.
        keep: is given (block, K, V) of the references, each `(B, R, H, d)`, and what they are computed from.
        take: gives K and V of a block instead of computing them; then the image stream holds noise tokens only.
        alone: the image stream holds reference tokens only, and nothing else is computed.
    """

    layout: TokenLayout
    parts: tuple[int, ...]
    temb: torch.Tensor | None = None
    keep: Callable[[int, torch.Tensor, torch.Tensor, ReferenceSource], None] | None = None
    take: Callable[[int], KeyValue] | None = None
    alone: bool = False


@dataclass
class _Keys:
    """K and V of one block's references, each `(B, R, H, d)`, and their input; None until their own call has run."""

    tensors: KeyValue | None = None
    given: ReferenceInput | None = None


class IsolatedAttention(AttentionStandIn):
    """Attention of one half of a block: references over themselves, or text and noise over all keys.

    Args:
        stock: the processor that it stands in for.
        adapter: the model's transformer side.
        isolation: that it belongs to; while it is suspended, the stock processor runs.
    """

    def __init__(self, stock: Any, adapter: TransformerAdapter, isolation: Isolation) -> None:
        super().__init__(stock, adapter)
        self._isolation = isolation

    # The attention modules pass only arguments that are named here, FLUX's the first five by position.
    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        reference_keys: _Keys | None = None,
    ) -> Any:
        """What the stock processor returns, for the tokens of `hidden_states` `(B, tokens, D)`."""
        if self._isolation.suspended:
            return self._as_stock(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                image_rotary_emb,
                encoder_hidden_states_mask,
            )
        joint = self._adapter.joint_qkv(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        key, value = joint.key, joint.value
        if reference_keys is None:
            raise ReferenceCacheError(_OUTSIDE)
        if reference_keys.tensors is None:
            reference_keys.tensors = key, value
            reference_keys.given = self._input_of(hidden_states, image_rotary_emb, hidden_states.shape[1])
        else:
            key, value = (torch.cat(pair, dim=1) for pair in zip((key, value), reference_keys.tensors, strict=True))
        mask = key_mask(attention_mask, encoder_hidden_states_mask, key.shape[1])
        return self._attend(attn, joint, key, value, mask)


class IsolatedBlock(ModelHook):  # type: ignore[misc]  # diffusers counts as Any
    """Calls a stock block once for the references and once for text and noise.

    The last block returns noise tokens only: nothing reads what becomes of the references behind it.
    """

    def __init__(
        self, isolation: Isolation, adapter: TransformerAdapter, attention: Any, index: int, last: bool
    ) -> None:
        super().__init__()
        self.isolation = isolation
        self._adapter = adapter
        self._attention = attention
        self._index = index
        self._last = last

    def new_forward(self, block: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by diffusers in place of the block's forward; (text, image)."""
        if self.isolation.suspended:
            stock: tuple[torch.Tensor, torch.Tensor] = self.fn_ref.original_forward(*args, **kwargs)
            return stock
        block_kwargs = bind_forward(block, args, kwargs)
        attention_kwargs = dict(block_kwargs.get("joint_attention_kwargs") or {})
        passing: ReferencePass | None = attention_kwargs.pop(PASSING, None)
        if passing is None:
            raise ReferenceCacheError(_OUTSIDE)
        if not isinstance(self._attention.processor, IsolatedAttention):
            raise ReferenceCacheError(
                f"block {self._index} attends with {type(self._attention.processor).__name__}, which was set after its "
                "references were isolated; end the isolation, set it, and isolate them anew"
            )
        references = None
        if passing.take is not None:
            keys = _Keys(passing.take(self._index))
        else:
            first = 0 if passing.alone else passing.layout.noise
            tokens = block_kwargs["hidden_states"][:, first:]
            keys, references = self._references(block_kwargs, attention_kwargs, passing, tokens)
            if passing.alone:
                return block_kwargs["encoder_hidden_states"], references
        halved = self._adapter.noise_only_block(block_kwargs, passing.layout)
        halved["hidden_states"] = halved["hidden_states"][:, : passing.layout.noise]
        halved["joint_attention_kwargs"] = {**attention_kwargs, KEPT: keys}
        text, image = self.fn_ref.original_forward(**halved)  # (B, T, D), (B, N, D)
        if references is not None and not self._last:
            image = torch.cat([image, references], dim=1)
        return text, image

    def _references(
        self,
        block_kwargs: dict[str, Any],
        attention_kwargs: dict[str, Any],
        passing: ReferencePass,
        tokens: torch.Tensor,
    ) -> tuple[_Keys, torch.Tensor]:
        """(K and V, what becomes of `tokens` `(B, R, D)` in this block)."""
        found: list[_Keys] = []
        outputs: list[torch.Tensor] = []
        start = 0
        for length in passing.parts:
            found.append(_Keys())
            # What stands before the part, and the part.
            layout = TokenLayout(passing.layout.noise + start, length)
            halved = self._adapter.reference_only_block(block_kwargs, layout)
            halved["hidden_states"] = tokens[:, start : start + length]
            halved |= {"temb": passing.temb, "joint_attention_kwargs": {**attention_kwargs, KEPT: found[-1]}}
            outputs.append(self.fn_ref.original_forward(**halved)[1])
            start += length
        keys = found[0] if len(found) == 1 else _joined(found)
        if passing.keep is not None and keys.tensors is not None and keys.given is not None:
            source = source_of(self._adapter, self._attention, keys.given, passing.parts)
            passing.keep(self._index, *keys.tensors, source)
        return keys, outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _joined(parts: Sequence[_Keys]) -> _Keys:
    """K, V and input of all references, from those of each."""
    tensors = [part.tensors for part in parts if part.tensors is not None]
    given = [part.given for part in parts if part.given is not None]
    frequencies = zip(*(each for _, each in given), strict=True)
    key, value = (torch.cat(one, dim=1) for one in zip(*tensors, strict=True))
    modulated = torch.cat([tokens for tokens, _ in given], dim=1)
    return _Keys((key, value), (modulated, tuple(torch.cat(one) for one in frequencies)))


class SplitEmbedding(ModelHook):  # type: ignore[misc]  # diffusers counts as Any
    """Embeds noise and references apart: a matrix product of fewer rows may round otherwise."""

    def __init__(self, isolation: Isolation) -> None:
        super().__init__()
        self._isolation = isolation

    def new_forward(self, embedder: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """Called by diffusers in place of the embedder's forward; `(B, tokens, C)` to `(B, tokens, D)`."""
        if self._isolation.suspended:
            return cast(torch.Tensor, self.fn_ref.original_forward(hidden_states))
        noise = self._isolation.noise_tokens()
        halves = (hidden_states[:, :noise], hidden_states[:, noise:])
        return torch.cat([self.fn_ref.original_forward(half) for half in halves if half.shape[1]], dim=1)


class Isolation:
    """Isolated references on one transformer, until `remove()` or the end of a `with`."""

    def __init__(self, module: nn.Module, adapter: TransformerAdapter, apart: bool = False) -> None:
        self._module: Any = module
        self._adapter = adapter
        self._apart = apart
        self._blocks: list[Any] = list(adapter.blocks(module))
        self.suspended = False
        self._passing: ReferencePass | None = None
        self._attention: list[tuple[Any, IsolatedAttention]] = []
        self._zero_cond_t = [part for part in (module, *self._blocks) if getattr(part, "zero_cond_t", False)]
        self._hooked: list[nn.Module] = []
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
        for part in self._hooked:
            remove_hook(part, ISOLATION_HOOK)
        for part in self._zero_cond_t:
            part.zero_cond_t = True
        self._handles, self._attention, self._hooked, self._zero_cond_t, self._passing = [], [], [], [], None

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
        for index, block in enumerate(self._blocks):
            last = index == len(self._blocks) - 1
            hook = IsolatedBlock(self, self._adapter, self._attention[index][0], index, last)
            self._hook(block, hook)
        self._hook(self._adapter.image_embedder(self._module), SplitEmbedding(self))
        embedder = self._adapter.timestep_embedder(self._module)
        self._handles = [
            # Before all hooks of diffusers, those of the caches too: they are given the pass among the arguments.
            self._module.register_forward_pre_hook(self._begin, with_kwargs=True),
            embedder.register_forward_hook(self._embed),
        ]

    def _hook(self, part: nn.Module, hook: ModelHook) -> None:
        HookRegistry.check_if_exists_or_initialize(part).register_hook(hook, ISOLATION_HOOK)
        self._hooked.append(part)

    def noise_tokens(self) -> int:
        """In the image stream of the call that is under way; ReferenceCacheError where there is none."""
        if self._passing is None:
            raise ReferenceCacheError(_OUTSIDE)
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
        self._passing = ReferencePass(layout, parts)
        name = self._adapter.attention_kwargs_name
        forward_kwargs[name] = {**(forward_kwargs.get(name) or {}), PASSING: self._passing}
        return (), forward_kwargs

    def _embed(self, embedder: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Here, within the forward: offloading has brought the weights to the device, and autocast is on."""
        passing = self._passing
        if not self.suspended and passing is not None and passing.temb is None and passing.take is None:
            passing.temb = embedder.forward(*self._adapter.reference_conditioning(args))


_OUTSIDE = (
    "a block of a transformer with isolated references was run outside of the transformer's own call; call the "
    "transformer itself, not its forward() or its blocks"
)


@contextmanager
def references_in_full(module: nn.Module) -> Iterator[None]:
    """Within, references of this transformer see everything, as in the stock model, whether they are isolated or not.

    Raises ReferenceCacheError while a reference KV cache is on.
    """
    hooks = [hook for part in module.modules() if (hook := installed_hook(part, ISOLATION_HOOK)) is not None]
    isolation: Isolation | None = next((hook.isolation for hook in hooks if isinstance(hook, IsolatedBlock)), None)
    if isolation is None:
        yield
        return
    if installed_hook(module, REFERENCE_KV_HOOK) is not None:
        raise ReferenceCacheError("the reference KV cache is on for this transformer; remove it first")
    with isolation.suspend():
        yield


def isolate_references(target: Any, apart: bool = False) -> Isolation:
    """Let reference tokens see reference tokens only, at t = 0, as a LoRA with isolated references was trained.

    The transformer then returns noise tokens only, `(B, N, C)`: the part
    of its output that pipelines use. A LoRA may be loaded before or after. The reference KV cache of such a model is
    exact.

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
