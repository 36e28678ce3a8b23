"""Transformer side of Qwen-Image and its edit models: what the sampling caches know of `QwenImageTransformer2DModel`.

Shapes: B batch, N noise tokens, R reference tokens, T text tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from typing import Any, cast

import torch
from torch import nn

from dittocache.families.batch_rows import batch_rows
from dittocache.families.denoiser import is_isolated
from dittocache.families.lora_scale import lora_scaled, without_scale
from dittocache.families.polynomials import PUBLISHED
from dittocache.families.transformer_side import CacheContext, JointQKV, TokenLayout
from dittocache.families.usual_forward import UsualForward


class QwenImageTransformerAdapter(UsualForward):
    """`QwenImageTransformer2DModel`, with live t (Edit, 2509) and with `zero_cond_t` (2511)."""

    class_name = "QwenImageTransformer2DModel"
    pipeline_class_names: tuple[str, ...] = (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
    )
    attention_processor_class_names: tuple[str, ...] = ("QwenDoubleStreamAttnProcessor2_0",)
    attention_kwargs_name = "attention_kwargs"
    polynomial = PUBLISHED["qwen-image-spec"]
    signal_ignores_text = True

    def extract_context(self, module: nn.Module, **forward_kwargs: Any) -> CacheContext:
        """Take one forward pass apart; keyword arguments are those of the model's forward."""
        return _take_apart(cast(Any, module), **forward_kwargs)

    def token_layout(self, module: nn.Module, forward_kwargs: Mapping[str, Any]) -> TokenLayout:
        """Noise tokens by the first of `img_shapes` (all but the last for layered models), references after them."""
        tokens = forward_kwargs["hidden_states"].shape[1]
        layered = bool(cast(Any, module).config.get("use_layer3d_rope", False))
        noise = [_noise_shapes(sample, layered) for sample in _shapes_of(forward_kwargs.get("img_shapes"))]
        counts, layers = {sum(prod(shape) for shape in shapes) for shapes in noise}, max(map(len, noise), default=1)
        # No shapes, or samples that are laid out differently: no token is surely a reference.
        count = min(tokens, *counts) if len(counts) == 1 else tokens
        return TokenLayout(count, tokens - count, layers)

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """The dual-stream blocks."""
        return list(cast(Any, module).transformer_blocks)

    def final_norm(self, module: nn.Module) -> nn.Module:
        """`norm_out`."""
        return cast(nn.Module, module.norm_out)

    def noise_only(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Cut `hidden_states` and ControlNet residuals; `img_shapes` stay, since the text's positions follow from all.

        The text's RoPE offset is the maximum over all of `img_shapes`.
        """
        kwargs = dict(forward_kwargs)
        kwargs["hidden_states"] = kwargs["hidden_states"][:, : layout.noise]
        residuals = kwargs.get("controlnet_block_samples")
        if residuals is not None:
            kwargs["controlnet_block_samples"] = [residual[:, : layout.noise] for residual in residuals]
        return kwargs

    def rows(self, forward_kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
        """Every tensor has a row for each sample, `img_shapes` and `txt_seq_lens` an entry."""
        return batch_rows(forward_kwargs, rows, ("img_shapes", "txt_seq_lens"), whole=("attention_kwargs",))

    def noise_only_block(self, block_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Cut `modulate_index` `(B, N + R)` and the image half of the RoPE frequencies.

        Tokens of one picture are modulated alike, so that the index of the first, `(B, 1)`, stands for all: the same
        numbers, broadcast instead of chosen token by token.
        """
        kwargs = dict(block_kwargs)
        if kwargs.get("modulate_index") is not None:
            kwargs["modulate_index"] = kwargs["modulate_index"][:, : layout.noise if layout.layers > 1 else 1]
        image_freqs, text_freqs = kwargs["image_rotary_emb"]
        kwargs["image_rotary_emb"] = (image_freqs[: layout.noise], text_freqs)
        return kwargs

    def reference_only_block(self, block_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """No text, no mask; the references' part of the RoPE frequencies. Modulation is one vector: no index."""
        text = block_kwargs["encoder_hidden_states"]
        image_freqs, text_freqs = block_kwargs["image_rotary_emb"]
        end = layout.noise + layout.reference
        return {
            **block_kwargs,
            "encoder_hidden_states": text[:, :0],
            "encoder_hidden_states_mask": None,
            "image_rotary_emb": (image_freqs[layout.noise : end], text_freqs[:0]),
            "modulate_index": None,
        }

    def image_embedder(self, module: nn.Module) -> nn.Module:
        """`img_in`."""
        return cast(nn.Module, module.img_in)

    def timestep_embedder(self, module: nn.Module) -> nn.Module:
        """`time_text_embed`."""
        return cast(nn.Module, module.time_text_embed)

    def reference_conditioning(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """t = 0 as under `zero_cond_t`; what else there is (dtype, kind of picture) is no matter of step or prompt."""
        return (arguments[0] * 0, *arguments[1:])

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
        """Joint Q, K, V `(B, T + tokens, H, d)` of `hidden_states` `(B, tokens, D)` and the text `(B, T, D)`.

        With `behind` K and V are longer by those. Raises ValueError without a text stream, as the stock processor does.
        """
        if encoder_hidden_states is None:
            raise ValueError("Qwen-Image's attention needs encoder_hidden_states (the text stream), found None")
        attn = cast(Any, attention)
        image_freqs, text_freqs = (None, None) if image_rotary_emb is None else image_rotary_emb
        text, image = encoder_hidden_states, hidden_states
        keys, values = ([], []) if behind is None else ([one] for one in behind)
        return JointQKV(
            query=torch.cat(
                [
                    _heads(attn, attn.add_q_proj(text), attn.norm_added_q, text_freqs),
                    _heads(attn, attn.to_q(image), attn.norm_q, image_freqs),
                ],
                dim=1,
            ),
            key=torch.cat(
                [
                    _heads(attn, attn.add_k_proj(text), attn.norm_added_k, text_freqs),
                    _heads(attn, attn.to_k(image), attn.norm_k, image_freqs),
                    *keys,
                ],
                dim=1,
            ),
            value=torch.cat(
                [
                    _heads(attn, attn.add_v_proj(text), None, None),
                    _heads(attn, attn.to_v(image), None, None),
                    *values,
                ],
                dim=1,
            ),
            prefix=text.shape[1],
        )

    def reference_kv(
        self, attention: nn.Module, modulated: torch.Tensor, frequencies: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the image stream."""
        attn = cast(Any, attention)
        freqs = frequencies[0] if frequencies else None
        return _heads(attn, attn.to_k(modulated), attn.norm_k, freqs), _heads(attn, attn.to_v(modulated), None, None)

    def reference_frequencies(self, image_rotary_emb: Any, references: int) -> tuple[torch.Tensor, ...]:
        """The last of the image stream's."""
        return () if image_rotary_emb is None else (image_rotary_emb[0][-references:],)

    def reference_facts(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> Sequence[object]:
        """Sizes of all pictures, from which positions follow, and the kind of layer."""
        shapes = tuple(tuple(tuple(shape) for shape in sample) for sample in _shapes_of(forward_kwargs["img_shapes"]))
        return shapes, forward_kwargs.get("additional_t_cond")

    def reference_lengths(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> tuple[int, ...]:
        """By the first sample's `img_shapes`; the samples of a batch have references of the same sizes."""
        lengths: list[int] = []
        for shape in reversed(_shapes_of(forward_kwargs["img_shapes"])[0]):
            if sum(lengths) < layout.reference:
                lengths.insert(0, prod(shape))
        return tuple(lengths)

    def project_attention(self, attention: nn.Module, attended: torch.Tensor, prefix: int) -> Any:
        """(image, text) after the output projections."""
        attn = cast(Any, attention)
        image = attended[:, prefix:].contiguous()
        for layer in attn.to_out:  # projection, dropout
            image = layer(image)
        return image, attn.to_add_out(attended[:, :prefix].contiguous())

    def reference_is_exact(self, module: nn.Module) -> bool:
        """Where they are isolated; else references attend to the noise, also under `zero_cond_t`."""
        return is_isolated(module)


def _heads(attn: Any, projected: Any, norm: nn.Module | None, freqs: torch.Tensor | None) -> Any:
    """`(B, tokens, H * d)` as `(B, tokens, H, d)`, normalised and rotated."""
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    split = projected.unflatten(-1, (-1, attn.inner_dim // attn.heads))
    split = split if norm is None else norm(split)
    if freqs is None or split.shape[1] == 0:  # no text, beside isolated references: nothing to rotate
        return split
    return apply_rotary_emb_qwen(split, freqs, use_real=False)


def _shapes_of(img_shapes: Any) -> list[Sequence[tuple[int, int, int]]]:
    """`img_shapes` as one list of (frames, height, width) a sample; a bare tuple is a sample of one image."""
    return [[sample] if isinstance(sample[0], int) else sample for sample in img_shapes or ()]


def _noise_shapes(shapes: Sequence[tuple[int, int, int]], layered: bool) -> Sequence[tuple[int, int, int]]:
    return shapes[:-1] if layered and len(shapes) > 1 else shapes[:1]


def _take_apart(
    module: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    img_shapes: Any,
    encoder_hidden_states_mask: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    controlnet_block_samples: Sequence[torch.Tensor] | None = None,
    additional_t_cond: torch.Tensor | None = None,
    return_dict: bool = True,
) -> CacheContext:
    with lora_scaled(module, attention_kwargs):
        stack_input = module.img_in(hidden_states)  # (B, tokens, D)
        temb, modulate_index = _conditioning(module, stack_input, timestep, img_shapes, guidance, additional_t_cond)
        first = module.transformer_blocks[0]
        modulation, _ = first.img_mod(temb).chunk(2, dim=-1)
        modulated_input, _ = first._modulate(first.img_norm1(stack_input), modulation, modulate_index)

    def run_transformer_blocks() -> tuple[torch.Tensor, ...]:
        from diffusers.models.transformers.transformer_qwenimage import compute_text_seq_len_from_mask

        with lora_scaled(module, attention_kwargs):
            text = module.txt_in(module.txt_norm(encoder_hidden_states))  # (B, T, D)
            text_tokens, _, text_mask = compute_text_seq_len_from_mask(text, encoder_hidden_states_mask)
            image_freqs, text_freqs = module.pos_embed(
                img_shapes, max_txt_seq_len=text_tokens, device=stack_input.device
            )
            image = stack_input
            add_residual = _controlnet(controlnet_block_samples, len(module.transformer_blocks))
            for index, block in enumerate(module.transformer_blocks):
                text, image = block(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    encoder_hidden_states_mask=text_mask,
                    temb=temb,
                    image_rotary_emb=(image_freqs[: image.shape[1]], text_freqs),
                    joint_attention_kwargs=without_scale(attention_kwargs),
                    modulate_index=modulate_index,
                )
                image = add_residual(image, index)
        return image, text

    def postprocess(image: torch.Tensor) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        with lora_scaled(module, attention_kwargs):
            live_temb = temb.chunk(2, dim=0)[0] if module.zero_cond_t else temb
            output = module.proj_out(module.norm_out(image, live_temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    return CacheContext(
        modulated_input=modulated_input,
        hidden_states=stack_input,
        encoder_hidden_states=encoder_hidden_states,
        temb=temb,
        run_transformer_blocks=run_transformer_blocks,
        postprocess=postprocess,
    )


def _conditioning(
    module: Any, image: torch.Tensor, timestep: torch.Tensor, img_shapes: Any, guidance: Any, additional_t_cond: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Timestep embedding and, under `zero_cond_t`, which tokens `(B, tokens)` take its second half (1: t = 0)."""
    timestep = timestep.to(image.dtype)
    modulate_index = None
    if module.zero_cond_t:
        timestep = torch.cat([timestep, timestep * 0], dim=0)  # (2 B,): live t, then t = 0
        modulate_index = torch.zeros(image.shape[:2], device=image.device, dtype=torch.int)
        for row, sample in enumerate(_shapes_of(img_shapes)):
            modulate_index[row, prod(sample[0]) :] = 1
    if guidance is None:
        return module.time_text_embed(timestep, image, additional_t_cond), modulate_index
    guidance = guidance.to(image.dtype) * 1000
    return module.time_text_embed(timestep, guidance, image, additional_t_cond), modulate_index


def _controlnet(residuals: Sequence[torch.Tensor] | None, blocks: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Adds the ControlNet residual of block `index`; several neighbouring blocks share one."""
    if residuals is None:
        return lambda image, index: image
    shared = ceil(blocks / len(residuals))
    return lambda image, index: image + residuals[index // shared]
