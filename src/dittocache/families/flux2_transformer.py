"""What the step cache knows of FLUX.2's `Flux2Transformer2DModel`: dev, klein, and klein with its own reference cache.

Shapes: B batch, N noise tokens, R reference tokens, T text tokens, D width.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from dittocache.families.batch_rows import batch_rows
from dittocache.families.lora_scale import lora_scaled
from dittocache.families.polynomials import PLAIN, PUBLISHED
from dittocache.families.stock_blocks import run_stock_blocks
from dittocache.families.transformer_side import CacheContext, Polynomial, TokenLayout
from dittocache.families.usual_forward import FillsOwnCache

_OF_THE_CACHE = ("kv_cache", "kv_cache_mode", "num_ref_tokens", "ref_fixed_timestep")


class Flux2TransformerAdapter(FillsOwnCache):
    """`Flux2Transformer2DModel`: one modulation for all dual-stream blocks, one for all single-stream blocks.

    Noise tokens stand before the references, but behind them in the step that fills klein's reference cache; the
    steps after that have noise tokens only.
    """

    class_name = "Flux2Transformer2DModel"
    pipeline_class_names: tuple[str, ...] = (
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "Flux2KleinInpaintPipeline",
        "Flux2KleinKVPipeline",
    )
    polynomial = PLAIN  # nobody has published a fit for FLUX.2-dev
    polynomials: Mapping[str, Polynomial] = {
        "Flux2KleinPipeline": PUBLISHED["flux2-klein-base"],  # distilled klein has too few steps to skip any
        "Flux2KleinInpaintPipeline": PUBLISHED["flux2-klein-base"],
    }
    signal_ignores_text = True
    no_reference_cache = (
        "take Flux2KleinKVPipeline, which keeps the keys and values of references by itself, exactly, with the "
        "checkpoint that was trained for it"
    )

    def __init__(self) -> None:
        # Counting needs a read from the device. Prompt embeddings -> tokens -> (noise tokens, the ids that said so)
        self._noise_tokens: Any = WeakTensorKeyDictionary()

    def extract_context(self, module: nn.Module, **forward_kwargs: Any) -> CacheContext:
        """Take one forward pass apart, its noise tokens only; keyword arguments are those of the model's forward."""
        layout = self.token_layout(module, forward_kwargs)
        return _take_apart(self, cast(Any, module), forward_kwargs, layout)

    def token_layout(self, module: nn.Module, forward_kwargs: Mapping[str, Any]) -> TokenLayout:
        """By klein's reference cache where it is on; else noise has 0 in the first column of `img_ids`."""
        tokens = forward_kwargs["hidden_states"].shape[1]
        if forward_kwargs.get("kv_cache_mode") == "extract":
            reference = forward_kwargs.get("num_ref_tokens", 0)
            return TokenLayout(tokens - reference, reference)
        if forward_kwargs.get("kv_cache_mode") == "cached":
            return TokenLayout(tokens, forward_kwargs["kv_cache"].num_ref_tokens)
        noise = self._count_noise(forward_kwargs["img_ids"], forward_kwargs["encoder_hidden_states"])
        return TokenLayout(noise, tokens - noise)

    def begin_run(self, forward_kwargs: Mapping[str, Any]) -> None:
        """The same prompt may now stand beside another share of references: forget all but the count of these ids."""
        img_ids, prompt_embeds = forward_kwargs.get("img_ids"), forward_kwargs["encoder_hidden_states"]
        counted = self._noise_tokens.get(prompt_embeds, {})
        self._noise_tokens.clear()
        self._noise_tokens[prompt_embeds] = {
            tokens: (noise, ids) for tokens, (noise, ids) in counted.items() if ids() is img_ids
        }

    def noise_tokens(
        self, stream: torch.Tensor, layout: TokenLayout, forward_kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """First, unless the reference cache is being filled."""
        if forward_kwargs.get("kv_cache_mode") == "extract":
            return stream[:, -layout.noise :]
        return stream[:, : layout.noise]

    def noise_only(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Unchanged: `extract_context` passes references by."""
        return dict(forward_kwargs)

    def rows(self, forward_kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
        """Every tensor has a row for each sample but bare ids; klein's reference cache cannot be divided."""
        if forward_kwargs.get("kv_cache_mode") is not None:
            return None
        if (forward_kwargs.get("joint_attention_kwargs") or {}).keys() - {"scale"}:
            return None
        # The model takes the first sample's ids for all.
        return batch_rows(
            forward_kwargs, rows, (), whole=("img_ids", "txt_ids", "joint_attention_kwargs", *_OF_THE_CACHE)
        )

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """Dual-stream blocks, then single-stream blocks."""
        model = cast(Any, module)
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def final_norm(self, module: nn.Module) -> nn.Module:
        """`norm_out`; text has been cut off before it."""
        return cast(nn.Module, module.norm_out)

    def _count_noise(self, img_ids: torch.Tensor, prompt_embeds: torch.Tensor) -> int:
        # Pipelines put the pictures' ids together anew at every step; the prompt's embeddings stand for the run.
        known = self._noise_tokens.get(prompt_embeds, {})
        tokens = img_ids.shape[-2]
        if tokens not in known:
            ids = img_ids[0] if img_ids.ndim == 3 else img_ids
            known = {**known, tokens: (int((ids[:, 0] == 0).sum()), weakref.ref(img_ids))}
            self._noise_tokens[prompt_embeds] = known
        return int(known[tokens][0])


def _take_apart(
    adapter: Flux2TransformerAdapter, module: Any, forward_kwargs: Mapping[str, Any], layout: TokenLayout
) -> CacheContext:
    attention_kwargs = forward_kwargs.get("joint_attention_kwargs")
    hidden_states = adapter.noise_tokens(forward_kwargs["hidden_states"], layout, forward_kwargs)
    timestep, guidance = forward_kwargs["timestep"], forward_kwargs.get("guidance")
    with lora_scaled(module, attention_kwargs):
        guidance = None if guidance is None else guidance.to(hidden_states.dtype) * 1000
        temb = module.time_guidance_embed(timestep.to(hidden_states.dtype) * 1000, guidance)
        stack_input = module.x_embedder(hidden_states)  # (B, N, D)
        modulation = module.double_stream_modulation_img(temb)
        (shift, scale, _), _ = module.double_stream_modulation_img.split(modulation, 2)
        modulated_input = (1 + scale) * module.transformer_blocks[0].norm1(stack_input) + shift

    def run_transformer_blocks() -> tuple[torch.Tensor, ...]:
        stream = run_stock_blocks(module, adapter.final_norm(module), forward_kwargs)
        return (adapter.noise_tokens(stream, layout, forward_kwargs),)

    def postprocess(image: torch.Tensor) -> Any:
        from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput

        with lora_scaled(module, attention_kwargs):
            output = module.proj_out(module.norm_out(image, temb))
        return Flux2Transformer2DModelOutput(sample=output) if forward_kwargs.get("return_dict", True) else (output,)

    return CacheContext(
        modulated_input=modulated_input,
        hidden_states=stack_input,
        encoder_hidden_states=forward_kwargs["encoder_hidden_states"],
        temb=temb,
        run_transformer_blocks=run_transformer_blocks,
        postprocess=postprocess,
    )
