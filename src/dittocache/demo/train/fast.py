"""The transformer's forward pass arranged for training on CPU: same parameters, same function, less work.

The stock forward computes the modulation of every token twice under `zero_cond_t`, rotates with complex numbers that
compilers cannot fuse, and returns reference tokens that the loss never reads. A test holds both to the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import nn
from torch.nn import functional as F

GRID = (1, 8, 8)  # packed latent tokens of one 128x128 picture
TOKENS = 64


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of the last dimension; x (B, S, H, D), cos and sin (S, 1, D / 2) float32."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _heads(x: torch.Tensor, weights: list[nn.Linear], norms: list[Any], heads: int) -> list[torch.Tensor]:
    """One fused projection to queries, keys, values, each (B, S, H, D), the first two root-mean-square normalised."""
    fused = torch.cat([linear.weight for linear in weights])
    bias = torch.cat([linear.bias for linear in weights])
    parts = F.linear(x, fused, bias).view(*x.shape[:2], 3, heads, -1).unbind(dim=2)
    normed = []
    for part, norm in zip(parts[:2], norms, strict=True):
        wide = part.float()
        normed.append(wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.eps) * norm.weight)
    return [*normed, parts[2]]


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def block_forward(
    block: QwenImageTransformerBlock,
    image: torch.Tensor,
    text: torch.Tensor,
    image_mod: torch.Tensor,
    text_mod: torch.Tensor,
    bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block on image (B, 128, C) and text (B, T, C); image_mod (B, 2, 6C) holds target and reference rows."""
    attn = block.attn
    heads = attn.heads
    batch, length, width = text.shape[0], text.shape[1], text.shape[2]
    # (B, 2, 6C) -> (B, 128, 6C): each row serves the 64 tokens of its picture.
    rows = image_mod.float().repeat_interleave(TOKENS, dim=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, dim=-1)
    tshift1, tscale1, tgate1, tshift2, tscale2, tgate2 = text_mod.float().unsqueeze(1).chunk(6, dim=-1)

    q_i, k_i, v_i = _heads(
        _modulate(image, shift1, scale1), [attn.to_q, attn.to_k, attn.to_v], [attn.norm_q, attn.norm_k], heads
    )
    q_t, k_t, v_t = _heads(
        _modulate(text, tshift1, tscale1),
        [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj],
        [attn.norm_added_q, attn.norm_added_k],
        heads,
    )
    q = _rotate(torch.cat([q_t, q_i], dim=1), cos, sin) * (width // heads) ** -0.5
    k = _rotate(torch.cat([k_t, k_i], dim=1), cos, sin)
    v = torch.cat([v_t, v_i], dim=1)
    dtype = v.dtype
    q, k, v = (part.to(dtype).transpose(1, 2) for part in (q, k, v))  # (B, H, S, D)
    scores = (q @ k.mT).float() + bias  # (B, H, S, S)
    mixed = (scores.softmax(dim=-1).to(dtype) @ v).transpose(1, 2).reshape(batch, -1, width)
    image = image + gate1 * attn.to_out[0](mixed[:, length:])
    text = text + tgate1 * attn.to_add_out(mixed[:, :length])

    image = image + gate2 * _mlp(block.img_mlp, _modulate(image, shift2, scale2))
    text = text + tgate2 * _mlp(block.txt_mlp, _modulate(text, tshift2, tscale2))
    return image, text


def _mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = F.gelu(mlp.net[0].proj(x), approximate="tanh")
    output: torch.Tensor = mlp.net[2](hidden)
    return output


class TrainingForward:
    """Velocity of a batch of edits, with `zero_cond_t` chosen sample by sample.

    Args:
        transformer: the stock model, whose parameters are read at every call.
        text_length: T, of all prompts.
        compiled: whether blocks are compiled.
        isolated: reference tokens see reference tokens only (`dittocache.isolate_references`), by a mask.
    """

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        text_length: int,
        compiled: bool = True,
        isolated: bool = False,
    ) -> None:
        self.transformer = transformer
        self.hidden = torch.zeros(1, text_length + 2 * TOKENS, dtype=torch.bool)  # from all queries, or (S, S)
        if isolated:
            self.hidden = self.hidden.expand(text_length + 2 * TOKENS, -1).clone()
            self.hidden[-TOKENS:, :-TOKENS] = True
        image, text = transformer.pos_embed([[GRID, GRID]], max_txt_seq_len=text_length, device=torch.device("cpu"))
        angles = torch.cat([text, image])[:, None]  # (T + 128, 1, D / 2) complex
        self.cos, self.sin = angles.real.contiguous(), angles.imag.contiguous()
        self.block = torch.compile(block_forward, dynamic=False) if compiled else block_forward

    def __call__(
        self,
        noisy: torch.Tensor,
        reference: torch.Tensor,
        sigma: torch.Tensor,
        embeds: torch.Tensor,
        mask: torch.Tensor,
        zero_cond: torch.Tensor,
    ) -> torch.Tensor:
        """Return the predicted velocity (B, 64, 64) float32.

        noisy and reference are packed latents (B, 64, 64), sigma (B,) in (0, 1], embeds (B, T, 128), mask (B, T)
        bool, zero_cond (B,) bool: whether the reference tokens are modulated as at time zero.
        """
        model = self.transformer
        image = model.img_in(torch.cat([noisy, reference], dim=1)).float()
        text = model.txt_in(model.txt_norm(embeds)).float()
        temb = model.time_text_embed(torch.cat([sigma, sigma * 0]), image)
        live, zero = temb.float().chunk(2)
        pair = torch.stack([live, torch.where(zero_cond[:, None], zero, live)], dim=1)  # (B, 2, C)
        keys = torch.cat([mask, mask.new_ones(mask.shape[0], 2 * TOKENS)], dim=1)
        unseen = ~keys[:, None, None, :] | self.hidden  # (B, 1, 1 or S, S)
        bias = torch.zeros(unseen.shape).masked_fill(unseen, -1e4)
        for block in model.transformer_blocks:
            image, text = self.block(
                block, image, text, block.img_mod(pair), block.txt_mod(live), bias, self.cos, self.sin
            )
        velocity: torch.Tensor = model.proj_out(model.norm_out(image[:, :TOKENS], live))
        return velocity.float()
