"""Transformer side of FLUX.1 and Kontext: what the sampling caches know of `FluxTransformer2DModel`.

Shapes: B batch, N noise tokens, R reference tokens, T text tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, cast

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from dittocache.families.batch_rows import batch_rows
from dittocache.families.denoiser import is_isolated
from dittocache.families.lora_scale import lora_scaled, without_scale
from dittocache.families.polynomials import PUBLISHED
from dittocache.families.transformer_side import CacheContext, JointQKV, Polynomial, TokenLayout
from dittocache.families.usual_forward import UsualForward


class FluxTransformerAdapter(UsualForward):
    """`FluxTransformer2DModel`: dual-stream blocks, then single-stream blocks; Kontext's references are known by id."""

    class_name = "FluxTransformer2DModel"
    pipeline_class_names: tuple[str, ...] = (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
    )
    attention_processor_class_names: tuple[str, ...] = ("FluxAttnProcessor",)
    attention_kwargs_name = "joint_attention_kwargs"
    polynomial = PUBLISHED["flux"]
    polynomials: Mapping[str, Polynomial] = {
        "FluxKontextPipeline": PUBLISHED["flux-kontext"],
        "FluxKontextInpaintPipeline": PUBLISHED["flux-kontext"],
    }
    signal_ignores_text = False  # the pooled prompt is part of temb

    def __init__(self) -> None:
        # Counting needs a read from the device; a pipeline passes the same tensor at every step of a run.
        self._noise_tokens: Any = WeakTensorKeyDictionary()

    def extract_context(self, module: nn.Module, **forward_kwargs: Any) -> CacheContext:
        """Take one forward pass apart; keyword arguments are those of the model's forward."""
        return _take_apart(cast(Any, module), **forward_kwargs)

    def token_layout(self, module: nn.Module, forward_kwargs: Mapping[str, Any]) -> TokenLayout:
        """Noise tokens have 0 in the first column of `img_ids` `(N + R, 3)`, Kontext's references 1."""
        tokens = forward_kwargs["hidden_states"].shape[1]
        img_ids = forward_kwargs["img_ids"]
        if img_ids not in self._noise_tokens:
            ids = img_ids[0] if img_ids.ndim == 3 else img_ids
            self._noise_tokens[img_ids] = int((ids[:, 0] == 0).sum())
        noise = self._noise_tokens[img_ids]
        return TokenLayout(noise, tokens - noise)

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """Dual-stream blocks, then single-stream blocks."""
        model = cast(Any, module)
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def final_norm(self, module: nn.Module) -> nn.Module:
        """`norm_out`."""
        return cast(nn.Module, module.norm_out)

    def noise_only(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Cut `hidden_states`, `img_ids` and ControlNet residuals; each token's position is its own id."""
        kwargs = dict(forward_kwargs)
        kwargs["hidden_states"] = kwargs["hidden_states"][:, : layout.noise]
        kwargs["img_ids"] = kwargs["img_ids"][..., : layout.noise, :]
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if kwargs.get(name) is not None:
                kwargs[name] = [residual[:, : layout.noise] for residual in kwargs[name]]
        return kwargs

    def rows(self, forward_kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
        """Every tensor has a row for each sample but the ids, which all samples share."""
        if (forward_kwargs.get("joint_attention_kwargs") or {}).keys() - {"scale"}:
            return None  # an image prompt adapter's own tensors
        return batch_rows(forward_kwargs, rows, (), whole=("img_ids", "txt_ids", "joint_attention_kwargs"))

    def noise_only_block(self, block_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """The RoPE frequencies of text and noise; nothing is cut where the ids were cut before."""
        tokens = block_kwargs["encoder_hidden_states"].shape[1] + layout.noise
        return {**block_kwargs, "image_rotary_emb": _frequencies(block_kwargs, 0, tokens)}

    def reference_only_block(self, block_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """No text; the references' RoPE frequencies."""
        text = block_kwargs["encoder_hidden_states"]
        start = text.shape[1] + layout.noise
        freqs = _frequencies(block_kwargs, start, start + layout.reference)
        return {**block_kwargs, "encoder_hidden_states": text[:, :0], "image_rotary_emb": freqs}

    def image_embedder(self, module: nn.Module) -> nn.Module:
        """`x_embedder`."""
        return cast(nn.Module, module.x_embedder)

    def timestep_embedder(self, module: nn.Module) -> nn.Module:
        """`time_text_embed`."""
        return cast(nn.Module, module.time_text_embed)

    def reference_conditioning(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Zero for t, guidance and the pooled prompt: all of them are part of FLUX's one modulation vector."""
        return tuple(argument * 0 for argument in arguments)

    def attention_modules(self, module: nn.Module) -> Sequence[nn.Module]:
        """`attn` of every block."""
        return [cast(nn.Module, block.attn) for block in self.blocks(module)]

    def joint_qkv(
        self,
        attention: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        image_rotary_emb: Any,
        behind: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> JointQKV:
        """Joint Q, K, V of both streams, or of the one stream that holds text and image already, and of `behind`."""
        from diffusers.models.embeddings import apply_rotary_emb

        attn = cast(Any, attention)

        query = _heads(attn, attn.to_q(hidden_states), attn.norm_q)
        key = _heads(attn, attn.to_k(hidden_states), attn.norm_k)
        value = _heads(attn, attn.to_v(hidden_states))
        prefix = 0
        if encoder_hidden_states is not None:
            prefix = encoder_hidden_states.shape[1]
            query = torch.cat([_heads(attn, attn.add_q_proj(encoder_hidden_states), attn.norm_added_q), query], dim=1)
            key = torch.cat([_heads(attn, attn.add_k_proj(encoder_hidden_states), attn.norm_added_k), key], dim=1)
            value = torch.cat([_heads(attn, attn.add_v_proj(encoder_hidden_states)), value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        if behind is not None:
            key, value = torch.cat([key, behind[0]], dim=1), torch.cat([value, behind[1]], dim=1)
        return JointQKV(query, key, value, prefix)

    def reference_kv(
        self, attention: nn.Module, modulated: torch.Tensor, frequencies: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the image stream, or of the one stream."""
        from diffusers.models.embeddings import apply_rotary_emb

        attn = cast(Any, attention)
        key = _heads(attn, attn.to_k(modulated), attn.norm_k)
        if frequencies:
            key = apply_rotary_emb(key, frequencies, sequence_dim=1)
        return key, _heads(attn, attn.to_v(modulated))

    def reference_frequencies(self, image_rotary_emb: Any, references: int) -> tuple[torch.Tensor, ...]:
        """(cos, sin) of the last tokens."""
        return () if image_rotary_emb is None else tuple(part[-references:] for part in image_rotary_emb)

    def reference_facts(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> Sequence[object]:
        """Positions of the references."""
        return (forward_kwargs["img_ids"][..., layout.noise :, :],)

    def reference_lengths(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> tuple[int, ...]:
        """Kontext has one."""
        return (layout.reference,)

    def project_attention(self, attention: nn.Module, attended: torch.Tensor, prefix: int) -> Any:
        """(image, text) after the output projections; a single stream is projected by its block."""
        attn = cast(Any, attention)
        if attn.pre_only:
            return attended
        image = attended[:, prefix:].contiguous()
        for layer in attn.to_out:  # projection, dropout
            image = layer(image)
        return image, attn.to_add_out(attended[:, :prefix].contiguous())

    def reference_is_exact(self, module: nn.Module) -> bool:
        """Where they are isolated; else Kontext's references attend to the noise and are modulated by the live t."""
        return is_isolated(module)


def _heads(attn: Any, projected: Any, norm: nn.Module | None = None) -> Any:
    """`(B, tokens, H * d)` as `(B, tokens, H, d)`, normalised."""
    split = projected.unflatten(-1, (-1, attn.head_dim))
    return split if norm is None else norm(split)


def _frequencies(block_kwargs: Mapping[str, Any], start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of these tokens; the text stands first."""
    cos, sin = block_kwargs["image_rotary_emb"]
    return cos[start:end], sin[start:end]


def _take_apart(
    module: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timestep: torch.Tensor,
    img_ids: torch.Tensor,
    txt_ids: torch.Tensor,
    guidance: torch.Tensor | None = None,
    joint_attention_kwargs: Mapping[str, Any] | None = None,
    controlnet_block_samples: Sequence[torch.Tensor] | None = None,
    controlnet_single_block_samples: Sequence[torch.Tensor] | None = None,
    return_dict: bool = True,
    controlnet_blocks_repeat: bool = False,
) -> CacheContext:
    with lora_scaled(module, joint_attention_kwargs):
        stack_input = module.x_embedder(hidden_states)  # (B, tokens, D)
        timestep = timestep.to(stack_input.dtype) * 1000
        if guidance is None:
            temb = module.time_text_embed(timestep, pooled_projections)
        else:
            temb = module.time_text_embed(timestep, guidance.to(stack_input.dtype) * 1000, pooled_projections)
        modulated_input = module.transformer_blocks[0].norm1(stack_input, emb=temb)[0]

    def run_transformer_blocks() -> tuple[torch.Tensor, ...]:
        with lora_scaled(module, joint_attention_kwargs):
            text, image = module.context_embedder(encoder_hidden_states), stack_input
            ids = [positions[0] if positions.ndim == 3 else positions for positions in (txt_ids, img_ids)]
            block_kwargs = {
                "temb": temb,
                "image_rotary_emb": module.pos_embed(torch.cat(ids, dim=0)),
                "joint_attention_kwargs": _block_attention_kwargs(module, joint_attention_kwargs),
            }
            for blocks, residuals, repeat in (
                (module.transformer_blocks, controlnet_block_samples, controlnet_blocks_repeat),
                (module.single_transformer_blocks, controlnet_single_block_samples, False),
            ):
                for index, block in enumerate(blocks):
                    text, image = block(hidden_states=image, encoder_hidden_states=text, **block_kwargs)
                    if residuals is not None:
                        count = len(residuals)
                        image = image + residuals[index % count if repeat else index // ceil(len(blocks) / count)]
        return image, text

    def postprocess(image: torch.Tensor) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        with lora_scaled(module, joint_attention_kwargs):
            output = module.proj_out(module.norm_out(image, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    return CacheContext(
        modulated_input=modulated_input,
        hidden_states=stack_input,
        encoder_hidden_states=encoder_hidden_states,
        temb=temb,
        run_transformer_blocks=run_transformer_blocks,
        postprocess=postprocess,
    )


def _block_attention_kwargs(module: Any, joint_attention_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of the attention processors, with an IP-Adapter's pictures projected."""
    kwargs = without_scale(joint_attention_kwargs)
    if "ip_adapter_image_embeds" in kwargs:
        kwargs["ip_hidden_states"] = module.encoder_hid_proj(kwargs.pop("ip_adapter_image_embeds"))
    return kwargs
