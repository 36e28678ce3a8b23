"""Attention in which reference tokens may be present by their kept keys and values only.

Shapes: B batch, T text tokens, N noise tokens, R reference tokens, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dittocache.families.base import JointQKV, TransformerAdapter

Exchange = Callable[[int, JointQKV], tuple[torch.Tensor, torch.Tensor]]


class ReferenceAttention:
    """Stands in for the stock attention processor of one block.

    Args:
        stock: the processor that it stands in for; keeps its backend.
        block: number of the block: its slot.
        adapter: the model's transformer side.
        exchange: takes (block, Q K V of the tokens that are there), gives the keys and values to attend to; None
            from `is_stock()` means that the stock processor runs.
        is_stock: whether this step runs the stock processor.
    """

    def __init__(
        self,
        stock: Any,
        block: int,
        adapter: TransformerAdapter,
        exchange: Exchange,
        is_stock: Callable[[], bool],
    ) -> None:
        self.stock = stock
        self._block = block
        self._adapter = adapter
        self._exchange = exchange
        self._is_stock = is_stock

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
        if self._is_stock():
            masks = {"attention_mask": attention_mask, "encoder_hidden_states_mask": encoder_hidden_states_mask}
            given = {name: mask for name, mask in masks.items() if mask is not None}
            return self.stock(attn, hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb, **given)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        joint = self._adapter.joint_qkv(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        key, value = self._exchange(self._block, joint)  # (B, T + N + R, H, d)
        attended = dispatch_attention_fn(
            joint.query,
            key,
            value,
            attn_mask=_key_mask(attention_mask, encoder_hidden_states_mask, key.shape[1]),
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        attended = attended.flatten(2, 3).to(joint.query.dtype)  # (B, T + tokens, H * d)
        return self._adapter.project_attention(attn, attended, joint.prefix)


def _key_mask(attention_mask: torch.Tensor | None, text_mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """Mask over all keys, `(B, 1, 1, T + N + R)`: text as `text_mask` `(B, T)` says, every image token visible."""
    if text_mask is None:
        return attention_mask
    image = text_mask.new_ones((text_mask.shape[0], keys - text_mask.shape[1]), dtype=torch.bool)
    return torch.cat([text_mask.to(torch.bool), image], dim=1)[:, None, None, :]
