"""What the step cache knows of Qwen-Image 2.1's `QwenImage21Transformer2DModel`.

Text and pictures are one causal sequence, the noise last. With `causal_condition` all that stands before the noise is
modulated from t = 0, so that the model's own prefix cache (`kv_cache`) is exact. A skipped step touches none of it.

Shapes: B batch, N noise tokens, R reference tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import nn

from dittocache.families.batch_rows import batch_rows
from dittocache.families.lora_scale import lora_scaled
from dittocache.families.polynomials import PLAIN
from dittocache.families.stock_blocks import run_stock_blocks
from dittocache.families.transformer_side import CacheContext, TokenLayout
from dittocache.families.usual_forward import FillsOwnCache


class QwenImage21TransformerAdapter(FillsOwnCache):
    """`QwenImage21Transformer2DModel`: one stream, one modulation for all blocks."""

    class_name = "QwenImage21Transformer2DModel"
    pipeline_class_names: tuple[str, ...] = ("QwenImage21Pipeline",)
    polynomial = PLAIN  # nobody has published a fit
    signal_ignores_text = True
    no_reference_cache = (
        "its pipeline keeps the keys and values of text and references by itself (use_kv_cache, on unless turned off), "
        "exactly, where the checkpoint has causal_condition"
    )

    def extract_context(self, module: nn.Module, **forward_kwargs: Any) -> CacheContext:
        """Take one forward pass apart, its noise tokens only; keyword arguments are those of the model's forward."""
        layout = self.token_layout(module, forward_kwargs)
        return _take_apart(self, cast(Any, module), forward_kwargs, layout)

    def token_layout(self, module: nn.Module, forward_kwargs: Mapping[str, Any]) -> TokenLayout:
        """Noise tokens by the last of `img_shapes`; the samples of a batch are laid out alike."""
        noise = prod(forward_kwargs["img_shapes"][0][-1])
        return TokenLayout(noise, forward_kwargs["hidden_states"].shape[1] - noise)

    def noise_tokens(
        self, stream: torch.Tensor, layout: TokenLayout, forward_kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The last tokens, of the whole sequence as of one without its prefix."""
        return stream[:, -layout.noise :]

    def noise_only(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Unchanged: `extract_context` passes text and references by."""
        return dict(forward_kwargs)

    def rows(self, forward_kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
        """Every tensor has a row for each sample but `img_mask`, of which one may serve all; not the prefix cache."""
        if forward_kwargs.get("kv_cache") is not None:
            return None
        samples, mask = len(forward_kwargs["hidden_states"]), forward_kwargs["img_mask"]
        shapes = forward_kwargs["img_shapes"]
        whole = {
            "attention_kwargs",
            *(("img_mask",) if len(mask) != samples else ()),
            *(("img_shapes",) if len(shapes) != samples else ()),  # the model reads the first entry of either
        }
        return batch_rows(forward_kwargs, rows, ("img_shapes",), whole=whole)

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """`transformer_blocks`."""
        return list(cast(Any, module).transformer_blocks)

    def final_norm(self, module: nn.Module) -> nn.Module:
        """`norm_out`."""
        return cast(nn.Module, module.norm_out)


def _take_apart(
    adapter: QwenImage21TransformerAdapter, module: Any, forward_kwargs: Mapping[str, Any], layout: TokenLayout
) -> CacheContext:
    attention_kwargs = forward_kwargs.get("attention_kwargs")
    hidden_states = adapter.noise_tokens(forward_kwargs["hidden_states"], layout, forward_kwargs)
    with lora_scaled(module, attention_kwargs):
        stack_input = module.img_in(hidden_states)  # (B, N, D)
        temb = module.time_text_embed(forward_kwargs["timestep"].to(stack_input.dtype), stack_input)
        first = module.transformer_blocks[0]
        modulation, _ = module.modulation(temb).chunk(2, dim=-1)
        # No mask: all of these tokens are noise, which has the live t.
        modulated_input, _ = first._modulate(first.img_norm1(stack_input), modulation, None)

    def run_transformer_blocks() -> tuple[torch.Tensor, ...]:
        stream = run_stock_blocks(module, adapter.final_norm(module), forward_kwargs)
        return (adapter.noise_tokens(stream, layout, forward_kwargs),)

    def postprocess(image: torch.Tensor) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        with lora_scaled(module, attention_kwargs):
            output = module.proj_out(module.norm_out(image, temb))
        return Transformer2DModelOutput(sample=output) if forward_kwargs.get("return_dict", True) else (output,)

    return CacheContext(
        modulated_input=modulated_input,
        hidden_states=stack_input,
        encoder_hidden_states=None,  # within the one stream
        temb=temb,
        run_transformer_blocks=run_transformer_blocks,
        postprocess=postprocess,
    )
