"""Isolated references by a mask over all pairs of tokens, in one call: the plain way to say what isolation is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class DenseAttention:
    """Tokens of each group of references, of these lengths, see their group alone; everything else sees everything."""

    def __init__(self, adapter: Any, lengths: Sequence[int]) -> None:
        self._adapter = adapter
        self._lengths = lengths

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
    ) -> Any:
        joint = self._adapter.joint_qkv(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        batch, tokens = joint.query.shape[:2]
        seen = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool)
        start = tokens - sum(self._lengths)
        for length in self._lengths:
            seen[:, :, start : start + length] = False
            seen[:, :, start : start + length, start : start + length] = True
            start += length
        if encoder_hidden_states_mask is not None:
            text = encoder_hidden_states_mask.shape[1]
            seen[..., :text] &= encoder_hidden_states_mask[:, None, None, :]
        heads = (tensor.transpose(1, 2) for tensor in (joint.query, joint.key, joint.value))
        attended = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen)
        return self._adapter.project_attention(attn, attended.transpose(1, 2).flatten(2, 3), joint.prefix)
