"""What the FLUX.1 families have in common: their artifacts, batches and LoRA targets. Encoding side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.errors import ModelError
from dittocache.families.base import Artifact, ArtifactInput, Sizes, Tensors, TrainingInputs
from dittocache.families.flow_matching import interpolate, picture_shapes, stack
from dittocache.families.flux_encoding import (
    EMPTY_PROMPT,
    MAX_SEQUENCE_LENGTH,
    encode_prompts,
    packed_latents,
    pooled_embeds,
    sequence_embeds,
)
from dittocache.families.loading import load_components
from dittocache.families.loss_masks import LOSS_MASK, mask_artifact, mask_pictures
from dittocache.families.packed_latents import (
    PACKED_PIXELS,
    encode_pictures,
    facts_of,
    packed_shapes,
    target_request,
    vae_requests,
)
from dittocache.families.pictures import PictureRequest, Pictures, request_facts, resized_picture
from dittocache.families.transformer_side import TransformerAdapter

TRAINING_GUIDANCE = 1.0  # what a guidance-distilled model is told while training: no extrapolation
LATENTS: Mapping[str, Any] = {"posterior": "mode", "packing": "2x2"}

SizeOf = Callable[[Path], tuple[int, int]]


class FluxFamily(ABC):
    """Encoding side of a family around `FluxTransformer2DModel`.

    Args:
        name: the family's name in configs.
        guidance: True for a guidance-distilled checkpoint (`guidance_embeds` in the transformer's config).
    """

    pipeline_class_name: str
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
        "proj_mlp",
        # With its block, for the model's last layer is a proj_out too.
        r"single_transformer_blocks\.\d+\.proj_out",
    )

    def __init__(self, name: str, guidance: bool) -> None:
        self.name = name
        self.guidance = guidance

    @abstractmethod
    def controls(self, sample: Sample, sizes: Sizes, size_of: SizeOf = picture_size) -> list[PictureRequest]:
        """The sample's references as the VAE takes them, each with its `size`; raises DataError for unfit ones."""

    @cached_property
    def transformer(self) -> TransformerAdapter:
        """The transformer side, which encoding never needs."""
        from dittocache.families.flux_transformer import FluxTransformerAdapter

        return FluxTransformerAdapter()

    def artifacts(self, sample: Sample, sizes: Sizes, size_of: SizeOf = picture_size) -> Sequence[Artifact]:
        """The artifacts of a sample: six, and one more for each of references and loss mask.

        Raises DataError for control pictures that the family cannot use.
        """
        controls = self.controls(sample, sizes, size_of)
        size = {"size": list(sample.size)}
        target = (ArtifactInput("target", file=sample.target),)
        prompt = (ArtifactInput("prompt", text=sample.prompt),)
        empty = (ArtifactInput("prompt", text=EMPTY_PROMPT),)
        t5 = {"max_sequence_length": MAX_SEQUENCE_LENGTH}
        references = tuple(ArtifactInput("control", file=path) for path in sample.controls)
        control_facts = {"controls": [request_facts(one) for one in controls]}
        shapes = {"shapes": _picture_shapes(sample, controls)} if controls else {**size, "packed_pixels": PACKED_PIXELS}
        return (
            Artifact("image_latents", "vae", target, {**request_facts(target_request(sample)), **LATENTS}),
            *([Artifact("control_latents", "vae", references, {**control_facts, **LATENTS})] if controls else []),
            Artifact("pooled_prompt_embeds", "text_encoder", prompt),
            Artifact("empty_pooled_prompt_embeds", "text_encoder", empty),
            Artifact("prompt_embeds", "text_encoder_2", prompt, t5),
            Artifact("empty_prompt_embeds", "text_encoder_2", empty, t5),
            Artifact("img_shapes", None, (), shapes),
            *mask_artifact(sample, PACKED_PIXELS),
        )

    def load_pipeline(
        self, model: str, components: Collection[str], dtype: torch.dtype, device: str | torch.device
    ) -> Any:
        """A pipeline of `pipeline_class_name` with `components` only; raises ModelError when `model` is not one."""
        return load_components(self.pipeline_class_name, model, components, dtype, device)

    def pictures(
        self, encoder: str | None, sample: Sample, sizes: Sizes, wanted: Collection[str] | None = None
    ) -> Sequence[PictureRequest]:
        """The target and the references for the VAE; the loss mask, which no encoder sees."""
        by_artifact: dict[str, Sequence[PictureRequest]] = {}
        if encoder == "vae":
            by_artifact = vae_requests(sample, self.controls(sample, sizes))
        elif encoder is None:
            by_artifact = {LOSS_MASK: mask_pictures(sample)}
        return [one for name, parts in by_artifact.items() if wanted is None or name in wanted for one in parts]

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
                facts_of(sample, partial(self._shapes, sample, sizes), pictures, wanted, index)
                for index, sample in enumerate(samples)
            ]
        if encoder == "vae":
            requests = [vae_requests(sample, self.controls(sample, sizes)) for sample in samples]
            return encode_pictures(pipe, requests, wanted, pictures, partial(packed_latents, pipe), largest_batch)
        if encoder == "text_encoder":
            return encode_prompts(samples, "pooled_prompt_embeds", partial(pooled_embeds, pipe), wanted, largest_batch)
        if encoder == "text_encoder_2":
            return encode_prompts(samples, "prompt_embeds", partial(sequence_embeds, pipe), wanted, largest_batch)
        raise ModelError(f"{self.name} has no encoder {encoder!r}; expected {', '.join(self.encoders)} or None")

    def training_inputs(self, batch: Sequence[Tensors], noise: torch.Tensor, sigmas: torch.Tensor) -> TrainingInputs:
        """One batch for `FluxTransformer2DModel.forward`: noisy target tokens, then the clean reference tokens.

        `noise` `(B, N, 64)`, `sigmas` `(B,)` in [0, 1]. Raises DataError where the samples are not of one bucket.
        """
        [shapes, *_] = picture_shapes(batch)
        noisy, target = interpolate(stack(batch, "image_latents", noise), noise, sigmas)
        tokens = noisy.shape[1]
        if len(shapes) > 1:
            noisy = torch.cat([noisy, stack(batch, "control_latents", noise)], dim=1)  # (B, N + R, 64)
        prompt_embeds = stack(batch, "prompt_embeds", noise)  # (B, 512, D)
        return TrainingInputs(
            transformer_kwargs={
                "hidden_states": noisy,
                "timestep": sigmas.to(noise),
                "guidance": self._guidance(len(batch), noise.device),
                "pooled_projections": stack(batch, "pooled_prompt_embeds", noise),
                "encoder_hidden_states": prompt_embeds,
                "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=noise.device, dtype=noise.dtype),
                "img_ids": _picture_ids(shapes, noise),
            },
            target=target,
            select=lambda output: output[:, :tokens],
        )

    def _guidance(self, batch_size: int, device: torch.device) -> torch.Tensor | None:
        return torch.full((batch_size,), TRAINING_GUIDANCE, device=device) if self.guidance else None

    def _shapes(self, sample: Sample, sizes: Sizes) -> list[tuple[int, int, int]]:
        return _picture_shapes(sample, self.controls(sample, sizes))


def _size(request: PictureRequest) -> tuple[int, int]:
    assert request.size is not None, "FLUX references have sizes of their own"
    return request.size


def _picture_shapes(sample: Sample, controls: Sequence[PictureRequest]) -> list[tuple[int, int, int]]:
    """Frames, height and width in packed latents of the target and of each reference."""
    return packed_shapes([sample.size, *(_size(request) for request in controls)])


def _picture_ids(shapes: Sequence[tuple[int, int, int]], noise: torch.Tensor) -> torch.Tensor:
    """Positions `(N + R, 3)`: 0 for the target's tokens, 1 for a reference's; row; column."""
    from diffusers import FluxPipeline

    ids = []
    for picture, (_, height, width) in enumerate(shapes):
        one = FluxPipeline._prepare_latent_image_ids(1, height, width, noise.device, noise.dtype)
        one[:, 0] = min(picture, 1)  # as Kontext's prepare_latents marks its reference
        ids.append(one)
    return torch.cat(ids)
