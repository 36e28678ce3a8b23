"""One transformer block whose references are computed by a call of their own.

Shapes: B batch, T text tokens, N noise tokens, R reference tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from dittocache.errors import ReferenceCacheError
from dittocache.families.denoiser import ISOLATION_HOOK, installed_hook, remove_hook
from dittocache.families.run_clock import bind_forward
from dittocache.families.transformer_side import TokenLayout, TransformerAdapter
from dittocache.referencekv.attention import AttentionStandIn, ReferenceInput, key_mask, source_of
from dittocache.referencekv.storage import KeyValue, ReferenceSource

PASSING = "reference_pass"  # among the attention arguments, on the way from the transformer's door to its blocks
KEPT = "reference_keys"  # the same, from a block to its attention
OUTSIDE = (
    "a block of a transformer with isolated references was run outside of the transformer's own call; call the "
    "transformer itself, not its forward() or its blocks"
)

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Suspendable(Protocol):
    """What an isolated block asks of the isolation that it belongs to."""

    suspended: bool
    """Whether everything is stock for now."""


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

    def __init__(self, stock: Any, adapter: TransformerAdapter, isolation: Suspendable) -> None:
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
        if reference_keys is None:
            raise ReferenceCacheError(OUTSIDE)
        joint = self._adapter.joint_qkv(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb, reference_keys.tensors
        )
        if reference_keys.tensors is None:
            reference_keys.tensors = joint.key, joint.value
            reference_keys.given = self._input_of(hidden_states, image_rotary_emb, hidden_states.shape[1])
        mask = key_mask(attention_mask, encoder_hidden_states_mask, joint.key.shape[1])
        return self._attend(attn, joint, mask)


class IsolatedBlock:
    """Calls a stock block once for the references and once for text and noise.

    The last block returns noise tokens only: nothing reads what becomes of the references behind it.

    A block that was compiled by itself (`block.compile()`, diffusers' `compile_repeated_blocks`) is called from outside
    of its graph, so that all blocks share the graph of the references and the graph of text and noise.

    Args:
        isolation: that it belongs to; while it is suspended, the stock block runs.
        adapter: the model's transformer side.
        block: the stock block.
        attention: its attention module.
        index: its number.
        last: whether it is the last one.
    """

    def __init__(
        self, isolation: Suspendable, adapter: TransformerAdapter, block: Any, attention: Any, index: int, last: bool
    ) -> None:
        self._isolation = isolation
        self._adapter = adapter
        self._block = block
        self._attention = attention
        self._index = index
        self._last = last
        self._compiled: Any = None

    def attach(self) -> None:
        """Also where the block was compiled since the last time; costs nothing where nothing has changed."""
        found = self._block._compiled_call_impl
        if found is None and self._compiled is None:
            if installed_hook(self._block, ISOLATION_HOOK) is None:
                hook = _IsolatedForward(self)
                HookRegistry.check_if_exists_or_initialize(self._block).register_hook(hook, ISOLATION_HOOK)
        elif found is not None and found != self._call_compiled:
            self._unhook()  # it would be compiled into the block, and make a graph of its own for each
            self._compiled, self._block._compiled_call_impl = found, self._call_compiled

    def detach(self) -> None:
        """Leave the block as it was."""
        self._unhook()
        if self._block._compiled_call_impl == self._call_compiled:  # else it was compiled anew since
            self._block._compiled_call_impl = self._compiled
        self._compiled = None

    def _unhook(self) -> None:
        if installed_hook(self._block, ISOLATION_HOOK) is not None:
            remove_hook(self._block, ISOLATION_HOOK)

    def _call_compiled(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.divided(self._compiled, args, kwargs)

    def divided(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(text, image) of a call of the block with these arguments; `forward` runs the stock block."""
        if self._isolation.suspended:
            return forward(*args, **kwargs)
        block_kwargs = bind_forward(self._block, args, kwargs)
        attention_kwargs = dict(block_kwargs.get("joint_attention_kwargs") or {})
        passing: ReferencePass | None = attention_kwargs.pop(PASSING, None)
        if passing is None:
            raise ReferenceCacheError(OUTSIDE)
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
            keys, references = self._references(forward, block_kwargs, attention_kwargs, passing, tokens)
            if passing.alone:
                return block_kwargs["encoder_hidden_states"], references
        halved = self._adapter.noise_only_block(block_kwargs, passing.layout)
        halved["hidden_states"] = halved["hidden_states"][:, : passing.layout.noise]
        halved["joint_attention_kwargs"] = {**attention_kwargs, KEPT: keys}
        text, image = forward(**halved)  # (B, T, D), (B, N, D)
        if references is not None and not self._last:
            image = torch.cat([image, references], dim=1)
        return text, image

    def _references(
        self,
        forward: Forward,
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
            outputs.append(forward(**halved)[1])
            start += length
        keys = found[0] if len(found) == 1 else _joined(found)
        if passing.keep is not None and keys.tensors is not None and keys.given is not None:
            source = source_of(self._adapter, self._attention, keys.given, passing.parts)
            passing.keep(self._index, *keys.tensors, source)
        return keys, outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class _IsolatedForward(ModelHook):  # type: ignore[misc]  # diffusers counts as Any
    def __init__(self, isolated: IsolatedBlock) -> None:
        super().__init__()
        self._isolated = isolated

    def new_forward(self, block: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._isolated.divided(self.fn_ref.original_forward, args, kwargs)


def _joined(parts: Sequence[_Keys]) -> _Keys:
    """K, V and input of all references, from those of each."""
    tensors = [part.tensors for part in parts if part.tensors is not None]
    given = [part.given for part in parts if part.given is not None]
    frequencies = zip(*(each for _, each in given), strict=True)
    key, value = (torch.cat(one, dim=1) for one in zip(*tensors, strict=True))
    modulated = torch.cat([tokens for tokens, _ in given], dim=1)
    return _Keys((key, value), (modulated, tuple(torch.cat(one) for one in frequencies)))
