"""What the step cache knows of Z-Image's `ZImageTransformer2DModel`: lists of pictures in, lists of pictures out.

Pictures `(C, F, H, W)` are cut into patches, refined by themselves, and join the prompt behind them in the main
layers. Both kinds of layers count as the block stack: a skipped step embeds the patches and projects them back.

Shapes: B samples, N tokens of a picture (without its padding to a multiple of 32), D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from dittocache.errors import StepCacheError
from dittocache.families.lora_scale import lora_scaled
from dittocache.families.polynomials import PLAIN
from dittocache.families.stock_blocks import run_stock_blocks
from dittocache.families.transformer_side import CacheContext, TokenLayout
from dittocache.families.usual_forward import UsualForward


class ZImageTransformerAdapter(UsualForward):
    """`ZImageTransformer2DModel`; its omni mode (pictures beside the noise) is predicted by its output only."""

    class_name = "ZImageTransformer2DModel"
    pipeline_class_names: tuple[str, ...] = (
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
        "ZImageOmniPipeline",
    )
    polynomial = PLAIN  # the published fit is for another signal
    signal_ignores_text = True
    no_reference_cache = "in Z-Image Omni references and noise see each other in every layer"

    def extract_context(self, module: nn.Module, **forward_kwargs: Any) -> CacheContext:
        """Take one forward pass apart; keyword arguments are those of the model's forward.

        Raises StepCacheError in omni mode, and for pictures of several sizes.
        """
        return _take_apart(self, cast(Any, module), forward_kwargs)

    def token_layout(self, module: nn.Module, forward_kwargs: Mapping[str, Any]) -> TokenLayout:
        """Patches of the picture that is made; in omni mode those of the others are references."""
        pictures = forward_kwargs["x"][0]
        *others, made = pictures if isinstance(pictures, list) else [pictures]
        return TokenLayout(
            _patches(made, forward_kwargs),
            sum(_patches(one, forward_kwargs) for one in others if one is not None),
        )

    def run_arguments(self, forward_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """`x`, `t` and `cap_feats`. t rises from 0 to 1, sigma is 1 - t; the prompts' list is made anew every step."""
        made = forward_kwargs["x"][0]
        made = made[-1] if isinstance(made, list) else made
        prompt = forward_kwargs["cap_feats"][0]
        return {
            "hidden_states": made.expand(len(forward_kwargs["x"]), *made.shape),
            "timestep": 1 - forward_kwargs["t"],
            "encoder_hidden_states": prompt[0] if isinstance(prompt, list) else prompt,
        }

    def noise_tokens(
        self, stream: torch.Tensor, layout: TokenLayout, forward_kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The first tokens of a stream `(B, tokens, D)`; an output is the noise's picture already."""
        return stream[:, : layout.noise] if stream.ndim == 3 else stream

    def noisy_latents(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> torch.Tensor:
        """The pictures that are made, `(B, C, F, H, W)`, negated: the output is the velocity away from the noise."""
        made = [one[-1] if isinstance(one, list) else one for one in forward_kwargs["x"]]
        return -torch.stack(made)

    def noise_only(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Unchanged: the prompt is not embedded by `extract_context`."""
        return dict(forward_kwargs)

    def rows(self, forward_kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
        """Lists have an entry and tensors a row for each sample.

        ControlNet residuals are as long as the longest prompt asks, which may be of a sample that is left out.
        """
        kwargs, residuals = dict(forward_kwargs), forward_kwargs.get("controlnet_block_samples")
        if residuals is not None and len({len(prompt) for prompt in kwargs["cap_feats"]}) > 1:
            return None
        index = list(rows)
        for name in ("x", "cap_feats", "siglip_feats", "image_noise_mask"):
            if kwargs.get(name) is not None:
                kwargs[name] = [kwargs[name][row] for row in index]
        kwargs["t"] = kwargs["t"][index]
        if residuals is not None:
            kwargs["controlnet_block_samples"] = {layer: residual[index] for layer, residual in residuals.items()}
        return kwargs

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """The layers that refine the noise, then the main layers."""
        model = cast(Any, module)
        return [*model.noise_refiner, *model.layers]

    def final_norm(self, module: nn.Module) -> nn.Module:
        """The final layer; of several patch sizes the first."""
        model = cast(Any, module)
        return cast(nn.Module, model.all_final_layer[f"{model.all_patch_size[0]}-{model.all_f_patch_size[0]}"])


def _patch(forward_kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Sides of a patch: (pixels of a latent, frames)."""
    return forward_kwargs.get("patch_size", 2), forward_kwargs.get("f_patch_size", 1)


def _patches(picture: torch.Tensor, forward_kwargs: Mapping[str, Any]) -> int:
    (side, depth), (_, frames, height, width) = _patch(forward_kwargs), picture.shape
    return (frames // depth) * (height // side) * (width // side)


def _take_apart(adapter: ZImageTransformerAdapter, module: Any, forward_kwargs: Mapping[str, Any]) -> CacheContext:
    pictures = forward_kwargs["x"]
    if isinstance(pictures[0], list):
        raise StepCacheError(
            "Z-Image in omni mode has pictures beside the noise, which only a prediction of the output can skip: "
            "take gate 'error'"
        )
    if len({tuple(picture.shape) for picture in pictures}) > 1:
        raise StepCacheError(
            f"the pictures of a batch must be of one size, found {[tuple(one.shape) for one in pictures]}: ask for "
            "each size by itself"
        )
    side, depth = _patch(forward_kwargs)
    key, attention_kwargs = f"{side}-{depth}", forward_kwargs.get("joint_attention_kwargs")
    layout = adapter.token_layout(module, forward_kwargs)
    with lora_scaled(module, attention_kwargs):
        temb = module.t_embedder(forward_kwargs["t"] * module.t_scale).type_as(pictures[0])
        patches = torch.stack([module._patchify_image(one, side, depth)[0] for one in pictures])
        stack_input = module.all_x_embedder[key](patches)  # (B, N, D)
        first = module.noise_refiner[0]
        scale = 1 + first.adaLN_modulation(temb).chunk(4, dim=1)[0]
        modulated_input = first.attention_norm1(stack_input) * scale[:, None]

    def run_transformer_blocks() -> tuple[torch.Tensor, ...]:
        stream = run_stock_blocks(module, module.all_final_layer[key], forward_kwargs)
        return (adapter.noise_tokens(stream, layout, forward_kwargs),)

    def postprocess(image: torch.Tensor) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        with lora_scaled(module, attention_kwargs):
            projected = module.all_final_layer[key](image, c=temb)
        sizes = [tuple(one.shape[1:]) for one in pictures]
        output = module.unpatchify(list(projected.unbind(dim=0)), sizes, side, depth)
        return Transformer2DModelOutput(sample=output) if forward_kwargs.get("return_dict", True) else (output,)

    return CacheContext(
        modulated_input=modulated_input,
        hidden_states=stack_input,
        encoder_hidden_states=None,  # joins the one stream in the main layers
        temb=temb,
        run_transformer_blocks=run_transformer_blocks,
        postprocess=postprocess,
    )
