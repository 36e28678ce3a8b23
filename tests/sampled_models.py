"""Small transformers of models that are only sampled from, and one step of each as its pipeline calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, QwenImage21Transformer2DModel, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from tests.denoising import enliven

CHANNELS = 8
TEXT_WIDTH = 12
NOISE = (4, 6)  # tokens, height by width
REFERENCE = (4, 4)


def random(salt: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(salt))


def qwen21_transformer() -> Any:
    model = QwenImage21Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return enliven(model)


def flux2_transformer(guidance: bool = False, own_cache: bool = False, channels: int = CHANNELS) -> Any:
    model = Flux2Transformer2DModel(
        in_channels=channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
        timestep_guidance_channels=16,
    )
    if own_cache:
        for block in model.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return enliven(model)


def z_image_transformer(omni: bool = False) -> Any:
    model = ZImageTransformer2DModel(
        in_channels=CHANNELS // 2,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        siglip_feat_dim=TEXT_WIDTH if omni else None,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    return enliven(model)


@dataclass(frozen=True)
class Model:
    """One model: how to build it, and what its pipeline passes at a step.

    Attributes:
        build: a transformer of width 32.
        arguments: of (latents `(B, N, C)`, sigma, branch).
        free: modules, by name, that a skipped step with a predicted residual may run.
    """

    build: Callable[[], Any]
    arguments: Callable[[torch.Tensor, float, str], dict[str, Any]]
    free: frozenset[str]

    def kwargs(self, latents: torch.Tensor, sigma: float, branch: str = "cond") -> dict[str, Any]:
        return self.arguments(latents, sigma, branch)


def _text(latents: torch.Tensor, branch: str, tokens: int) -> torch.Tensor:
    return random(3 + len(branch), len(latents), tokens, TEXT_WIDTH)


def qwen21_kwargs(latents: torch.Tensor, sigma: float, branch: str) -> dict[str, Any]:
    """One reference of 4 x 4 tokens, which takes 4 of the 9 places of the prompt."""
    samples = len(latents)
    mask = torch.zeros(samples, 9 + latents.shape[1] // 4, dtype=torch.bool)
    mask[:, 3:7] = mask[:, 9:] = True
    return {
        "hidden_states": torch.cat([random(2, samples, 16, CHANNELS), latents], dim=1),
        "timestep": torch.full((samples,), sigma),
        "encoder_hidden_states": _text(latents, branch, 9),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, *REFERENCE), (1, *NOISE)]] * samples,
        "img_mask": mask,
        "return_dict": False,
    }


def ids(t: int, height: int, width: int) -> torch.Tensor:
    """FLUX.2's `(1, tokens, 4)`."""
    return torch.cartesian_prod(
        torch.tensor([t]), torch.arange(height), torch.arange(width), torch.arange(1)
    )[None]  # fmt: skip


def flux2_kwargs(latents: torch.Tensor, sigma: float, branch: str) -> dict[str, Any]:
    samples = len(latents)
    return {
        "hidden_states": torch.cat([latents, random(2, samples, 16, CHANNELS)], dim=1),
        "timestep": torch.full((samples,), sigma),
        "encoder_hidden_states": _text(latents, branch, 5),
        "txt_ids": torch.zeros(samples, 5, 4),
        "img_ids": torch.cat([ids(0, *NOISE), ids(10, *REFERENCE)], dim=1).expand(samples, -1, -1),
        "return_dict": False,
    }


def flux2_guided_kwargs(latents: torch.Tensor, sigma: float, branch: str) -> dict[str, Any]:
    return {**flux2_kwargs(latents, sigma, branch), "guidance": torch.full((len(latents),), 4.0)}


def picture(latents: torch.Tensor) -> torch.Tensor:
    """A picture `(4, 1, 8, 12)` whose patches have the tokens `(N, 8)` for one half."""
    doubled = torch.cat([latents, latents.flip(1)], dim=1)  # (N, 16)
    return doubled.unflatten(0, NOISE).unflatten(-1, (4, 2, 2)).permute(2, 0, 3, 1, 4).reshape(4, 1, 8, 12)


def z_image_kwargs(latents: torch.Tensor, sigma: float, branch: str) -> dict[str, Any]:
    lengths = [7 + 40 * (row % 2) for row in range(len(latents))]  # padded to 32 and 64
    return {
        "x": [picture(one) for one in latents],
        "t": torch.full((len(latents),), 1 - sigma),
        "cap_feats": [random(3 + len(branch) + row, length, TEXT_WIDTH) for row, length in enumerate(lengths)],
        "return_dict": False,
    }


def latents(samples: int = 1, seed: int = 1) -> torch.Tensor:
    return random(seed, samples, NOISE[0] * NOISE[1], CHANNELS)


_NORMS = frozenset({"norm_out", "proj_out"})
MODELS = {
    "Qwen-Image 2.1": Model(
        qwen21_transformer,
        qwen21_kwargs,
        frozenset({"img_in", "time_text_embed", "modulation", "transformer_blocks.0.img_norm1"}) | _NORMS,
    ),
    "FLUX.2": Model(
        lambda: flux2_transformer(guidance=True),
        flux2_guided_kwargs,
        frozenset({"x_embedder", "time_guidance_embed", "double_stream_modulation_img", "transformer_blocks.0.norm1"})
        | _NORMS,
    ),
    "FLUX.2 klein": Model(
        flux2_transformer,
        flux2_kwargs,
        frozenset({"x_embedder", "time_guidance_embed", "double_stream_modulation_img", "transformer_blocks.0.norm1"})
        | _NORMS,
    ),
    "Z-Image": Model(
        z_image_transformer,
        z_image_kwargs,
        frozenset(
            {
                "all_x_embedder.2-1",
                "t_embedder",
                "noise_refiner.0.attention_norm1",
                "noise_refiner.0.adaLN_modulation",
                "all_final_layer.2-1",
            }
        ),
    ),
}
