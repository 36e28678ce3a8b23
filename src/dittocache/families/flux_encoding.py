"""How FLUX.1 pipelines encode pictures and prompts, by their own methods, one encoder at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from dittocache.data.sample import Sample
from dittocache.families.base import Tensors
from dittocache.families.encoding import encode_distinct, is_wanted

EMPTY_PROMPT = ""
MAX_SEQUENCE_LENGTH = 512  # T5 tokens, the pipeline's default; shorter prompts are padded to it


def packed_latents(pipe: Any, pictures: torch.Tensor) -> Sequence[torch.Tensor]:
    """Packed latents `(tokens, 64)` of each preprocessed picture of `(B, 3, H, W)`."""
    from diffusers import FluxKontextPipeline

    pictures = pictures.to(pipe.vae.device, pipe.vae.dtype)
    # FluxPipeline only decodes; Kontext is the FLUX.1 pipeline whose encoding is deterministic (mode, not sample),
    # and its method needs nothing but the VAE.
    latents = FluxKontextPipeline._encode_vae_image(pipe, pictures, generator=None)  # (B, 16, H / 8, W / 8)
    packed: torch.Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed.unbind()


def encode_prompts(
    samples: Sequence[Sample],
    name: str,
    encode: Callable[[Sequence[str]], Sequence[torch.Tensor]],
    wanted: Sequence[Collection[str]] | None,
    largest_batch: int,
) -> list[Tensors]:
    """`name` of every sample, and `empty_` and `name` beside it, as far as wanted; every text is encoded once."""
    prompts = [
        {
            artifact: prompt
            for artifact, prompt in ((name, sample.prompt), (f"empty_{name}", EMPTY_PROMPT))
            if is_wanted(wanted, index, artifact)
        }
        for index, sample in enumerate(samples)
    ]
    known = encode_distinct((prompt for one in prompts for prompt in one.values()), encode, largest_batch)
    return [{artifact: known[prompt] for artifact, prompt in one.items()} for one in prompts]


def pooled_embeds(pipe: Any, prompts: Sequence[str]) -> Sequence[torch.Tensor]:
    """CLIP's pooled embedding `(768,)` of each prompt."""
    pooled: torch.Tensor = pipe._get_clip_prompt_embeds(list(prompts), device=pipe.text_encoder.device)
    return pooled.unbind()


def sequence_embeds(pipe: Any, prompts: Sequence[str]) -> Sequence[torch.Tensor]:
    """T5's embeddings `(512, 4096)` of each prompt."""
    embeds: torch.Tensor = pipe._get_t5_prompt_embeds(
        list(prompts),
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        device=pipe.text_encoder_2.device,
        dtype=pipe.text_encoder_2.dtype,  # its default asks the CLIP encoder, which need not be loaded
    )
    return embeds.unbind()
