"""FLUX.1 text to image: dev (guidance-distilled) and schnell. Encoding side.

Text passes the pipeline's own CLIP and T5 methods one encoder at a time, so that only one has to be in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.errors import DataError, ModelError
from dittocache.families.base import Artifact, ArtifactInput, Sizes, Tensors, TrainingInputs, TransformerAdapter
from dittocache.families.encoding import encode_distinct, is_wanted
from dittocache.families.flow_matching import interpolate, picture_shapes, stack
from dittocache.families.loading import load_components
from dittocache.families.pictures import READING, RESAMPLING, PictureRequest, Pictures, resized_picture

EMPTY_PROMPT = ""
PACKED_PIXELS = 16  # pixels a side of one packed latent token: 8 by the VAE, 2 by packing
MAX_SEQUENCE_LENGTH = 512  # T5 tokens, the pipeline's default; shorter prompts are padded to it
TRAINING_GUIDANCE = 1.0  # what a guidance-distilled model is told while training: no extrapolation


class Flux:
    """Encoding side of FLUX.1.

    Args:
        name: `flux` or `flux-schnell`.
        guidance: True for a guidance-distilled checkpoint (`guidance_embeds` in the transformer's config).
    """

    pipeline_class_name = "FluxPipeline"
    encoders: Mapping[str, tuple[str, ...]] = {
        "vae": (),
        "text_encoder": ("tokenizer",),
        "text_encoder_2": ("tokenizer_2",),
    }
    size_multiple = PACKED_PIXELS
    lora_targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    def __init__(self, name: str = "flux", guidance: bool = True) -> None:
        self.name = name
        self.guidance = guidance

    @cached_property
    def transformer(self) -> TransformerAdapter:
        """The transformer side, which encoding never needs."""
        from dittocache.families.flux_transformer import FluxTransformerAdapter

        return FluxTransformerAdapter()

    def artifacts(
        self, sample: Sample, sizes: Sizes, size_of: Callable[[Path], tuple[int, int]] = picture_size
    ) -> Sequence[Artifact]:
        """The six artifacts of a sample; raises DataError where it has control pictures or a loss mask."""
        unused = [*sample.controls, *([sample.mask] if sample.mask else [])]
        if unused:
            raise DataError(
                f"sample {sample.name!r} has pictures that {self.name} cannot use: {', '.join(map(str, unused))}; "
                "FLUX.1 text to image takes no control picture and no loss mask: remove them"
            )
        size = {"size": list(sample.size)}
        target = (ArtifactInput("target", file=sample.target),)
        prompt = (ArtifactInput("prompt", text=sample.prompt),)
        empty = (ArtifactInput("prompt", text=EMPTY_PROMPT),)
        t5 = {"max_sequence_length": MAX_SEQUENCE_LENGTH}
        latents = {**size, "resampling": RESAMPLING, **READING, "posterior": "mode", "packing": "2x2"}
        return (
            Artifact("image_latents", "vae", target, latents),
            Artifact("pooled_prompt_embeds", "text_encoder", prompt),
            Artifact("empty_pooled_prompt_embeds", "text_encoder", empty),
            Artifact("prompt_embeds", "text_encoder_2", prompt, t5),
            Artifact("empty_prompt_embeds", "text_encoder_2", empty, t5),
            Artifact("img_shapes", None, (), {**size, "packed_pixels": PACKED_PIXELS}),
        )

    def load_pipeline(
        self, model: str, components: Collection[str], dtype: torch.dtype, device: str | torch.device
    ) -> Any:
        """A `FluxPipeline` with `components` only; raises ModelError when `model` is not one."""
        return load_components(self.pipeline_class_name, model, components, dtype, device)

    def pictures(
        self, encoder: str | None, sample: Sample, sizes: Sizes, wanted: Collection[str] | None = None
    ) -> Sequence[PictureRequest]:
        """The target, for the VAE."""
        if encoder != "vae" or (wanted is not None and "image_latents" not in wanted):
            return []
        return [_target(sample)]

    @torch.no_grad()
    def encode(
        self,
        pipe: Any,
        encoder: str | None,
        samples: Sequence[Sample],
        sizes: Sizes,
        *,
        wanted: Sequence[Collection[str]] | None = None,
        pictures: Pictures = resized_picture,
        together: bool = False,
    ) -> list[Tensors]:
        """The artifacts that `encoder` computes for each sample, on the encoder's device.

        Every prompt is padded to the same length, as in the pipeline, also when it is alone. Raises DataError naming a
        picture that cannot be read, ModelError for an unknown encoder.
        """
        largest_batch = max(len(samples), 1) if together else 1
        if encoder is None:
            return [
                {"img_shapes": _picture_shapes(sample)} if is_wanted(wanted, index, "img_shapes") else {}
                for index, sample in enumerate(samples)
            ]
        if encoder == "vae":
            return _encode_pictures(pipe, samples, wanted, pictures, largest_batch)
        if encoder == "text_encoder":
            return _encode_prompts(samples, "pooled_prompt_embeds", partial(_pooled, pipe), wanted, largest_batch)
        if encoder == "text_encoder_2":
            return _encode_prompts(samples, "prompt_embeds", partial(_sequence, pipe), wanted, largest_batch)
        raise ModelError(f"{self.name} has no encoder {encoder!r}; expected {', '.join(self.encoders)} or None")

    def training_inputs(self, batch: Sequence[Tensors], noise: torch.Tensor, sigmas: torch.Tensor) -> TrainingInputs:
        """One batch for `FluxTransformer2DModel.forward`; `noise` `(B, N, 64)`, `sigmas` `(B,)` in [0, 1].

        Raises DataError where the samples are not of one bucket.
        """
        from diffusers import FluxPipeline

        [[(_, height, width)], *_] = picture_shapes(batch)
        noisy, target = interpolate(stack(batch, "image_latents", noise), noise, sigmas)
        prompt_embeds = stack(batch, "prompt_embeds", noise)  # (B, 512, D)
        img_ids = FluxPipeline._prepare_latent_image_ids(len(batch), height, width, noise.device, noise.dtype)  # (N, 3)
        guidance = torch.full((len(batch),), TRAINING_GUIDANCE, device=noise.device) if self.guidance else None
        return TrainingInputs(
            transformer_kwargs={
                "hidden_states": noisy,
                "timestep": sigmas.to(noise),
                "guidance": guidance,
                "pooled_projections": stack(batch, "pooled_prompt_embeds", noise),
                "encoder_hidden_states": prompt_embeds,
                "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=noise.device, dtype=noise.dtype),
                "img_ids": img_ids,
            },
            target=target,
            select=lambda output: output,
        )


def _picture_shapes(sample: Sample) -> torch.Tensor:
    width, height = sample.size
    return torch.tensor([(1, height // PACKED_PIXELS, width // PACKED_PIXELS)], dtype=torch.int32)


def _target(sample: Sample) -> PictureRequest:
    return PictureRequest(sample.target, size=sample.size)


def _encode_pictures(
    pipe: Any,
    samples: Sequence[Sample],
    wanted: Sequence[Collection[str]] | None,
    pictures: Pictures,
    largest_batch: int,
) -> list[Tensors]:
    chosen = {
        index: _target(sample) for index, sample in enumerate(samples) if is_wanted(wanted, index, "image_latents")
    }

    def encode(batch: Sequence[PictureRequest]) -> Sequence[torch.Tensor]:
        preprocess = pipe.image_processor.preprocess
        return _packed_latents(pipe, torch.cat([preprocess(pictures(one)) for one in batch]))  # (B, 3, H, W)

    latents = encode_distinct(chosen.values(), encode, largest_batch, alike=lambda request: request.size)
    return [{"image_latents": latents[chosen[index]]} if index in chosen else {} for index in range(len(samples))]


def _packed_latents(pipe: Any, pictures: torch.Tensor) -> Sequence[torch.Tensor]:
    """Packed latents `(N, 64)` of each preprocessed picture of `(B, 3, H, W)`."""
    from diffusers import FluxKontextPipeline

    pictures = pictures.to(pipe.vae.device, pipe.vae.dtype)
    # FluxPipeline only decodes; Kontext is the FLUX.1 pipeline whose encoding is deterministic (mode, not sample),
    # and its method needs nothing but the VAE.
    latents = FluxKontextPipeline._encode_vae_image(pipe, pictures, generator=None)  # (B, 16, H / 8, W / 8)
    packed: torch.Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed.unbind()


def _encode_prompts(
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


def _pooled(pipe: Any, prompts: Sequence[str]) -> Sequence[torch.Tensor]:
    """CLIP's pooled embedding `(768,)` of each prompt."""
    pooled: torch.Tensor = pipe._get_clip_prompt_embeds(list(prompts), device=pipe.text_encoder.device)
    return pooled.unbind()


def _sequence(pipe: Any, prompts: Sequence[str]) -> Sequence[torch.Tensor]:
    """T5's embeddings `(512, 4096)` of each prompt."""
    embeds: torch.Tensor = pipe._get_t5_prompt_embeds(
        list(prompts),
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        device=pipe.text_encoder_2.device,
        dtype=pipe.text_encoder_2.dtype,  # its default asks the CLIP encoder, which need not be loaded
    )
    return embeds.unbind()
