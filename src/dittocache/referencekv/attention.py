"""Attention in which reference tokens may be present by their keys and values only.

Shapes: B batch, T text tokens, N noise tokens, R reference tokens, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from dittocache.errors import ReferenceCacheError
from dittocache.families.transformer_side import JointQKV, TransformerAdapter
from dittocache.referencekv.storage import KeyValue, ReferenceSource

ReferenceInput = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


class AttentionStandIn:
    """Stands in for the stock attention processor of one block and follows its arithmetic.

    Args:
        stock: the processor that it stands in for; keeps its backend.
        adapter: the model's transformer side.
    """

    def __init__(self, stock: Any, adapter: TransformerAdapter) -> None:
        self.stock = stock
        self._adapter = adapter

    # diffusers sets these two on whatever processor a block has.
    @property
    def _attention_backend(self) -> Any:
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.stock._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.stock._parallel_config = config

    def _as_stock(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        image_rotary_emb: Any,
        encoder_hidden_states_mask: torch.Tensor | None,
    ) -> Any:
        """The stock processor itself; FLUX's takes no mask of the text."""
        masks = {"attention_mask": attention_mask, "encoder_hidden_states_mask": encoder_hidden_states_mask}
        given = {name: mask for name, mask in masks.items() if mask is not None}
        return self.stock(attn, hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb, **given)

    def _input_of(self, hidden_states: torch.Tensor, image_rotary_emb: Any, references: int) -> ReferenceInput:
        """What K and V of the references, last among the tokens, are computed from."""
        first = hidden_states.shape[1] - references
        return hidden_states[:, first:], self._adapter.reference_frequencies(image_rotary_emb, references)

    def _attend(self, attn: Any, joint: JointQKV, mask: torch.Tensor | None) -> Any:
        """The stock processor's result for the queries of `joint`, over its keys and values `(B, keys, H, d)`."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        attended = dispatch_attention_fn(
            joint.query,
            joint.key,
            joint.value,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        attended = attended.flatten(2, 3).to(joint.query.dtype)  # (B, T + tokens, H * d)
        return self._adapter.project_attention(attn, attended, joint.prefix)


class ReferenceAttention(AttentionStandIn):
    """Attention of a block whose references are computed in some steps and remembered in others.

    It says nothing of the block that it is in, so that compiled blocks share their graphs.

    Attributes:
        given: K and V of the references to attend to, each `(B, R, H, d)`; None: they are among the tokens.
        leaves: number of reference tokens, last among the tokens, whose K and V are left behind; 0: none.
        leaves_input: whether what they are computed from is left behind too.
        left: K and V that were left behind.
        left_input: what the attention was given for them, `(B, R, D)`, and their RoPE frequencies.
    """

    def __init__(self, stock: Any, adapter: TransformerAdapter) -> None:
        super().__init__(stock, adapter)
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None
        self.leaves = 0
        self.leaves_input = False
        self.left: tuple[torch.Tensor, torch.Tensor] | None = None
        self.left_input: ReferenceInput | None = None

    def rest(self) -> None:
        """Be the stock processor again."""
        self.given, self.leaves, self.leaves_input, self.left, self.left_input = None, 0, False, None, None

    # The attention modules pass only arguments that are named here, FLUX's the first five by position.
    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
    ) -> Any:
        """What the stock processor returns, for the tokens of `hidden_states` `(B, tokens, D)`."""
        if self.given is None and self.leaves == 0:
            return self._as_stock(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                image_rotary_emb,
                encoder_hidden_states_mask,
            )
        joint = self._adapter.joint_qkv(attn, hidden_states, encoder_hidden_states, image_rotary_emb, self.given)
        if self.given is None:
            first = joint.key.shape[1] - self.leaves
            self.left = joint.key[:, first:], joint.value[:, first:]
            if self.leaves_input:
                self.left_input = self._input_of(hidden_states, image_rotary_emb, self.leaves)
        mask = key_mask(attention_mask, encoder_hidden_states_mask, joint.key.shape[1])
        return self._attend(attn, joint, mask)


def source_of(
    adapter: TransformerAdapter, attention: Any, given: ReferenceInput, parts: Sequence[int]
) -> ReferenceSource:
    """What K and V of one block's references are computed from, from what its attention was given for them.

    Args:
        parts: numbers of tokens that were projected together; more rows at a time may round otherwise.
    """
    modulated, frequencies = given
    return ReferenceSource(modulated, frequencies, partial(_project, adapter, attention, tuple(parts)))


def _project(
    adapter: TransformerAdapter,
    attention: Any,
    parts: tuple[int, ...],
    modulated: torch.Tensor,
    frequencies: tuple[torch.Tensor, ...],
) -> KeyValue:
    weight: torch.Tensor = next(attention.to_k.parameters())
    brought_in = hasattr(attention.to_k, "_hf_hook") or hasattr(attention.to_k, "_diffusers_hook")  # layer by layer
    if weight.device != modulated.device and not brought_in:
        raise ReferenceCacheError(
            "storage 'modulated_input' computes keys and values of references anew before each block, but the weights "
            f"of this block are on {weight.device}, its input on {modulated.device}: offloading brings them in later; "
            "set storage to native or fp8, or offload: true"
        )
    ends = list(accumulate(parts))
    spans = [slice(end - part, end) for end, part in zip(ends, parts, strict=True)]
    pairs = [
        adapter.reference_kv(attention, modulated[:, span], tuple(one[span] for one in frequencies)) for span in spans
    ]
    if len(pairs) == 1:
        return pairs[0]
    key, value = (torch.cat(one, dim=1) for one in zip(*pairs, strict=True))
    return key, value


def key_mask(attention_mask: torch.Tensor | None, text_mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """Mask over all keys, `(B, 1, 1, T + N + R)`: text as `text_mask` `(B, T)` says, every image token visible."""
    if text_mask is None:
        return attention_mask
    image = text_mask.new_ones((text_mask.shape[0], keys - text_mask.shape[1]), dtype=torch.bool)
    return torch.cat([text_mask.to(torch.bool), image], dim=1)[:, None, None, :]


def check_attention(module: nn.Module, adapter: TransformerAdapter, feature: str) -> None:
    """Raise ReferenceCacheError where attention is not computed as `adapter.joint_qkv` does; `feature` needs it."""
    expected = adapter.attention_processor_class_names
    attention_modules: list[Any] = list(adapter.attention_modules(module))
    for block, attention in enumerate(attention_modules):
        found = type(attention.processor).__name__
        if found not in expected:
            raise ReferenceCacheError(
                f"block {block} of {type(module).__name__} attends with {found}, but {feature} follows "
                f"{' or '.join(expected)}; put that back with set_attn_processor"
            )
        if getattr(attention, "fused_projections", False):
            raise ReferenceCacheError(
                f"block {block} of {type(module).__name__} has fused projections, which {feature} does "
                "not follow; call unfuse_qkv_projections() first"
            )
        if getattr(attention.processor, "_parallel_config", None) is not None:
            raise ReferenceCacheError(
                f"context parallelism splits the tokens between devices, which {feature} cannot follow; "
                "turn one of them off"
            )
