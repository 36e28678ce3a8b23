"""How the Qwen-Image families encode: by methods of the diffusers pipelines, each distinct input once a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image

from dittocache.data.sample import Sample
from dittocache.families.base import Tensors
from dittocache.families.encoding import encode_distinct, is_wanted, without_padding
from dittocache.families.loading import diffusers_class
from dittocache.families.pictures import PictureRequest, Pictures

EMPTY_PROMPT = ""  # the pipeline's template still surrounds it
CONTROL_MULTIPLE = 32  # the edit pipelines' calculate_dimensions rounds to it

Row = tuple[Sequence[Image.Image], str]  # the pictures that the text encoder sees, and the words
EncodePrompts = Callable[[Any, Sequence[Row]], Sequence[torch.Tensor]]


@cache
def prompt_template(pipeline_class_name: str) -> tuple[str, int]:
    """What a pipeline puts around a prompt, `{}` in its place, and how many of its first tokens it drops again."""
    pipeline_class = diffusers_class(pipeline_class_name)
    _, *components = inspect.signature(pipeline_class.__init__).parameters
    pipe = pipeline_class(**dict.fromkeys(components))
    return pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx


def packed_latents(vae: Any, pictures: torch.Tensor) -> Sequence[torch.Tensor]:
    """Packed latents `(tokens, 64)` of each preprocessed picture of `(B, 3, H, W)`."""
    from diffusers import QwenImageEditPlusPipeline

    # The text-to-image pipeline only decodes. What the edit pipelines encode with needs nothing but the VAE.
    pipe: Any = QwenImageEditPlusPipeline(None, vae, None, None, None, None)
    videos = pictures.unsqueeze(2).to(vae.device, vae.dtype)  # (B, 3, 1, H, W): of one frame
    latents = pipe._encode_vae_image(videos, generator=None)  # (B, 16, 1, H / 8, W / 8)
    count, channels, _, height, width = latents.shape
    packed: torch.Tensor = pipe._pack_latents(latents, count, channels, height, width)
    return packed.unbind()


def encode_prompts(
    pipe: Any,
    samples: Sequence[Sample],
    conditions: Sequence[Sequence[PictureRequest]],
    encode: EncodePrompts,
    wanted: Sequence[Collection[str]] | None,
    pictures: Pictures,
    largest_batch: int,
) -> list[Tensors]:
    """The embeddings and masks of each sample's prompt and of the empty one, as far as they are wanted.

    Args:
        conditions: for each sample the pictures that the text encoder sees beside the words.
        encode: gives the embeddings `(T, D)` of prompts that pass the text encoder together.
    """
    prompts = [
        {
            prefix: (tuple(shown), words)
            for prefix, words in (("", sample.prompt), ("empty_", EMPTY_PROMPT))
            if any(is_wanted(wanted, index, f"{prefix}{name}") for name in ("prompt_embeds", "prompt_embeds_mask"))
        }
        for index, (sample, shown) in enumerate(zip(samples, conditions, strict=True))
    ]
    distinct = dict.fromkeys(prompt for by_prefix in prompts for prompt in by_prefix.values())
    opened = {one: pictures(one) for one in dict.fromkeys(one for shown, _ in distinct for one in shown)}

    def embeds_of(
        batch: Sequence[tuple[tuple[PictureRequest, ...], str]],
    ) -> Sequence[torch.Tensor]:
        return encode(pipe, [([opened[one] for one in shown], words) for shown, words in batch])

    known = encode_distinct(distinct, embeds_of, largest_batch)
    tensors: list[Tensors] = []
    for index, by_prefix in enumerate(prompts):
        sample_tensors: Tensors = {}
        for prefix, prompt in by_prefix.items():
            embeds = known[prompt]
            # All true: neither a single prompt nor what is left of a batch without its padding is padded.
            mask = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device)
            both = {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}
            sample_tensors |= {name: tensor for name, tensor in both.items() if is_wanted(wanted, index, name)}
        tensors.append(sample_tensors)
    return tensors


def unpadded(embeds: torch.Tensor, mask: torch.Tensor | None) -> Sequence[torch.Tensor]:
    """The rows `(T, D)` of each prompt from what a pipeline's `encode_prompt` gives; no mask: nothing is padded."""
    return embeds.unbind() if mask is None else without_padding(embeds, mask)
