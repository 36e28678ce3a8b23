"""What the Qwen-Image families have in common: their artifacts, batches and LoRA targets. Encoding side.

Every tensor is computed by methods of the diffusers pipelines, with the calls that their own `__call__` makes, so that
a cached tensor is the tensor that the pipeline would have computed.
"""

from __future__ import annotations

import hashlib
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
from dittocache.families.flow_matching import interpolate, pad_prompts, picture_shapes, stack
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
from dittocache.families.pictures import (
    PictureRequest,
    Pictures,
    request_facts,
    requested_size,
    resized_picture,
)
from dittocache.families.qwen_image_encoding import (
    CONTROL_MULTIPLE,
    EMPTY_PROMPT,
    Row,
    encode_prompts,
    packed_latents,
    prompt_template,
)
from dittocache.families.qwen_processor import image_backend, load_still_image_processor
from dittocache.families.transformer_side import TransformerAdapter

SizeOf = Callable[[Path], tuple[int, int]]


class QwenImageFamily(ABC):
    """Encoding side of a family around `QwenImageTransformer2DModel`."""

    name: str
    pipeline_class_name: str
    encoders: Mapping[str, tuple[str, ...]] = {"vae": (), "text_encoder": ("tokenizer", "processor")}
    size_multiple: int
    lora_targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )

    @abstractmethod
    def check_pictures(self, sample: Sample) -> None:
        """Raise DataError where the sample has too many or too few control pictures."""

    @abstractmethod
    def condition_pictures(self, sample: Sample, sizes: Sizes) -> list[PictureRequest]:
        """The pictures that the text encoder sees beside the words."""

    @abstractmethod
    def embed_prompts(self, pipe: Any, rows: Sequence[Row]) -> Sequence[torch.Tensor]:
        """Prompt embeddings `(T, D)` of each row, without padding; a single row as the pipeline's call encodes it."""

    def words_before(self, pictures: int) -> str:
        """What the pipeline puts into its template before the words, for this many pictures."""
        return ""

    def prompt_facts(self) -> dict[str, Any]:
        """What a recipe says of the way from words to embeddings: the template, and how many tokens are dropped."""
        template, dropped = prompt_template(self.pipeline_class_name)
        return {"template": hashlib.blake2b(template.encode(), digest_size=16).hexdigest(), "drop_tokens": dropped}

    def controls(self, sample: Sample, sizes: Sizes) -> list[PictureRequest]:
        """The controls as the VAE takes them: resized as the pipeline does to the area of a square, or their own."""
        side = sizes.resolution if sample.control_resolution is None else sample.control_resolution
        return [control_request(sample, path, None if side == "own" else side) for path in sample.controls]

    @cached_property
    def transformer(self) -> TransformerAdapter:
        """The transformer side, which encoding never needs."""
        from dittocache.families.qwen_image_transformer import QwenImageTransformerAdapter

        return QwenImageTransformerAdapter()

    def artifacts(self, sample: Sample, sizes: Sizes, size_of: SizeOf = picture_size) -> Sequence[Artifact]:
        """The artifacts of a sample; raises DataError for control pictures that the family cannot use."""
        self.check_pictures(sample)
        latents = {"posterior": "mode", "packing": "2x2"}
        target = (ArtifactInput("target", file=sample.target),)
        controls = tuple(ArtifactInput("control", file=path) for path in sample.controls)
        shown = self.condition_pictures(sample, sizes)
        seen = controls if shown else ()
        prompt = (*seen, ArtifactInput("prompt", text=sample.prompt))
        empty = (*seen, ArtifactInput("prompt", text=EMPTY_PROMPT))
        # A control's own size follows from its content, which the key holds already, and from what is asked for.
        text = {
            **self.prompt_facts(),
            **({**request_facts(shown[0]), "image_backend": image_backend()} if shown else {}),
        }
        artifacts = [Artifact("image_latents", "vae", target, {**request_facts(target_request(sample)), **latents})]
        for request in self.controls(sample, sizes)[:1]:
            artifacts.append(Artifact("control_latents", "vae", controls, {**request_facts(request), **latents}))
        return (
            *artifacts,
            Artifact("prompt_embeds", "text_encoder", prompt, text),
            Artifact("prompt_embeds_mask", "text_encoder", prompt, text),
            Artifact("empty_prompt_embeds", "text_encoder", empty, text),
            Artifact("empty_prompt_embeds_mask", "text_encoder", empty, text),
            Artifact("img_shapes", None, (), {"shapes": self._shapes(sample, sizes, size_of)}),
            *mask_artifact(sample, PACKED_PIXELS),
        )

    def load_pipeline(
        self, model: str, components: Collection[str], dtype: torch.dtype, device: str | torch.device
    ) -> Any:
        """A pipeline of `pipeline_class_name` with `components` only; raises ModelError when `model` is not one."""
        builders = {} if image_backend() == "torchvision" else {"processor": load_still_image_processor}
        return load_components(self.pipeline_class_name, model, components, dtype, device, builders)

    def pictures(
        self, encoder: str | None, sample: Sample, sizes: Sizes, wanted: Collection[str] | None = None
    ) -> Sequence[PictureRequest]:
        """Target and controls for the VAE, what is shown to the text encoder, and the loss mask for none."""
        if encoder == "text_encoder":
            return self.condition_pictures(sample, sizes) if wanted is None or wanted else []
        by_artifact: dict[str, Sequence[PictureRequest]] = {LOSS_MASK: mask_pictures(sample)}
        if encoder is not None:
            by_artifact = vae_requests(sample, self.controls(sample, sizes))
        return [one for name in by_artifact if wanted is None or name in wanted for one in by_artifact[name]]

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

        By default pictures and prompts pass the encoders one by one, as in the pipeline. Pictures that pass together
        differ from that by rounding (3e-6 in float32, 2e-3 in bfloat16), and so do padded prompts. What several samples
        share is encoded once a call.

        Raises DataError naming a picture that cannot be read, ModelError for an unknown encoder.
        """
        if encoder is None:
            return [
                facts_of(sample, partial(self._shapes, sample, sizes, picture_size), pictures, wanted, index)
                for index, sample in enumerate(samples)
            ]
        largest_batch = max(len(samples), 1) if together else 1
        if encoder == "vae":
            requests = [vae_requests(sample, self.controls(sample, sizes)) for sample in samples]
            return encode_pictures(pipe, requests, wanted, pictures, partial(packed_latents, pipe.vae), largest_batch)
        if encoder == "text_encoder":
            shown = [self.condition_pictures(sample, sizes) for sample in samples]
            return encode_prompts(pipe, samples, shown, self.embed_prompts, wanted, pictures, largest_batch)
        raise ModelError(f"{self.name} has no encoder {encoder!r}; expected {', '.join(self.encoders)} or None")

    def training_inputs(self, batch: Sequence[Tensors], noise: torch.Tensor, sigmas: torch.Tensor) -> TrainingInputs:
        """One batch for `QwenImageTransformer2DModel.forward`: noisy target tokens, then the clean control tokens.

        `noise` `(B, N, 64)`, `sigmas` `(B,)` in [0, 1]; the transformer takes sigma itself as its timestep (the
        pipeline passes t / 1000). Raises DataError where the samples are not of one bucket.
        """
        img_shapes = picture_shapes(batch)
        noisy, target = interpolate(stack(batch, "image_latents", noise), noise, sigmas)  # (B, N, 64)
        tokens = noisy.shape[1]
        if len(img_shapes[0]) > 1:
            noisy = torch.cat([noisy, stack(batch, "control_latents", noise)], dim=1)  # (B, N + R, 64)
        prompt_embeds, prompt_embeds_mask = pad_prompts(batch, noise)
        return TrainingInputs(
            transformer_kwargs={
                "hidden_states": noisy,
                "timestep": sigmas.to(noise),
                "guidance": None,
                "encoder_hidden_states_mask": prompt_embeds_mask,
                "encoder_hidden_states": prompt_embeds,
                "img_shapes": img_shapes,
            },
            target=target,
            select=lambda output: output[:, :tokens],
        )

    def _shapes(self, sample: Sample, sizes: Sizes, size_of: SizeOf) -> list[tuple[int, int, int]]:
        """Frames, height and width in packed latents of the target and of each control."""
        pictures = [sample.size, *(requested_size(one, size_of) for one in self.controls(sample, sizes))]
        return packed_shapes(pictures)


def control_request(sample: Sample, path: Path, side: int | None) -> PictureRequest:
    """A control of about the area of a square of `side` pixels, or of its own."""
    area = None if side is None else side**2
    return PictureRequest(path, area=area, multiple=CONTROL_MULTIPLE, flipped=sample.flipped)
