"""Qwen-Image-Edit-Plus: Qwen-Image-Edit-2509, and 2511 with `zero_cond_t`. Encoding side.

Every tensor is computed by methods of diffusers' `QwenImageEditPlusPipeline`, with the calls that its own `__call__`
makes, so that a cached tensor is the tensor that the pipeline would have computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch

from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.errors import DataError, ModelError
from dittocache.families.base import Artifact, ArtifactInput, Sizes, Tensors, TrainingInputs, TransformerAdapter
from dittocache.families.flow_matching import interpolate, pad_prompts, picture_shapes, stack
from dittocache.families.loading import load_components
from dittocache.families.pictures import READING, open_picture
from dittocache.families.qwen_processor import image_backend, load_still_image_processor

EMPTY_PROMPT = ""  # the pipeline's template still surrounds it
PACKED_PIXELS = 16  # pixels a side of one packed latent token: 8 by the VAE, 2 by packing
CONTROL_MULTIPLE = 32  # the pipeline's calculate_dimensions rounds to it
RESAMPLING = "lanczos"  # the pipeline's VaeImageProcessor


class QwenImageEditPlus:
    """Encoding side of Qwen-Image-Edit-Plus; one instance serves every checkpoint of the family."""

    name = "qwen-image-edit-plus"
    pipeline_class_name = "QwenImageEditPlusPipeline"
    encoders: Mapping[str, tuple[str, ...]] = {"vae": (), "text_encoder": ("tokenizer", "processor")}
    size_multiple = CONTROL_MULTIPLE
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

    @cached_property
    def transformer(self) -> TransformerAdapter:
        """The transformer side, which encoding never needs."""
        from dittocache.families.qwen_image_transformer import QwenImageTransformerAdapter

        return QwenImageTransformerAdapter()

    def artifacts(self, sample: Sample, sizes: Sizes) -> Sequence[Artifact]:
        """The seven artifacts of a sample; raises DataError where it has no control picture, or has a loss mask."""
        if not sample.controls:
            raise DataError(
                f"sample {sample.name!r} has no control picture; {self.name} edits pictures: give at least one, "
                "or choose a text-to-image family"
            )
        if sample.mask is not None:
            raise DataError(
                f"sample {sample.name!r} has a loss mask ({sample.mask}); {self.name} weighs no losses: remove the mask"
            )
        controls = tuple(ArtifactInput("control", file=path) for path in sample.controls)
        target = (ArtifactInput("target", file=sample.target),)
        prompt = (*controls, ArtifactInput("prompt", text=sample.prompt))
        empty = (*controls, ArtifactInput("prompt", text=EMPTY_PROMPT))
        # A control's own size follows from its content, which the key holds already, and the area.
        control_area = {"area": sizes.resolution**2, "multiple": CONTROL_MULTIPLE, "resampling": RESAMPLING, **READING}
        latents = {"posterior": "mode", "packing": "2x2"}
        text = {
            "area": sizes.condition_resolution**2,
            "multiple": CONTROL_MULTIPLE,
            "resampling": RESAMPLING,
            **READING,
            "image_backend": image_backend(),
            **_template(),
        }
        size = {"size": list(sample.size)}
        return (
            Artifact("image_latents", "vae", target, {**size, "resampling": RESAMPLING, **READING, **latents}),
            Artifact("control_latents", "vae", controls, {**control_area, **latents}),
            Artifact("prompt_embeds", "text_encoder", prompt, text),
            Artifact("prompt_embeds_mask", "text_encoder", prompt, text),
            Artifact("empty_prompt_embeds", "text_encoder", empty, text),
            Artifact("empty_prompt_embeds_mask", "text_encoder", empty, text),
            Artifact("img_shapes", None, controls, {**size, **control_area, "packed_pixels": PACKED_PIXELS}),
        )

    def load_pipeline(
        self, model: str, components: Collection[str], dtype: torch.dtype, device: str | torch.device
    ) -> Any:
        """A `QwenImageEditPlusPipeline` with `components` only; raises ModelError when `model` is not one."""
        builders = {} if image_backend() == "torchvision" else {"processor": load_still_image_processor}
        return load_components(self.pipeline_class_name, model, components, dtype, device, builders)

    @torch.no_grad()
    def encode(
        self,
        pipe: Any,
        encoder: str | None,
        samples: Sequence[Sample],
        sizes: Sizes,
        *,
        empty_prompts: bool = True,
    ) -> list[Tensors]:
        """The artifacts that `encoder` computes for each sample, on the encoder's device.

        Pictures and prompts pass the encoders one by one, as in the pipeline, which takes one prompt a call. A VAE
        batch of four differs from four single passes (measured on a CPU: 4e-7 in float32, 2e-3 in bfloat16), and a
        cached tensor must not depend on its company. What several samples share is encoded once a call.

        Raises DataError naming a picture that cannot be read, ModelError for an unknown encoder.
        """
        if encoder is None:
            return [{"img_shapes": _picture_shapes(sample, sizes)} for sample in samples]
        if encoder == "vae":
            return _encode_pictures(pipe, samples, sizes)
        if encoder == "text_encoder":
            return _encode_prompts(pipe, samples, sizes, empty_prompts)
        raise ModelError(f"{self.name} has no encoder {encoder!r}; expected {', '.join(self.encoders)} or None")

    def training_inputs(self, batch: Sequence[Tensors], noise: torch.Tensor, sigmas: torch.Tensor) -> TrainingInputs:
        """One batch for `QwenImageTransformer2DModel.forward`: noisy target tokens, then the clean control tokens.

        `noise` `(B, N, 64)`, `sigmas` `(B,)` in [0, 1]; the transformer takes sigma itself as its timestep (the
        pipeline passes t / 1000). Raises DataError where the samples are not of one bucket.
        """
        img_shapes = picture_shapes(batch)
        latents = stack(batch, "image_latents", noise)  # (B, N, 64)
        controls = stack(batch, "control_latents", noise)  # (B, R, 64)
        noisy, target = interpolate(latents, noise, sigmas)
        prompt_embeds, prompt_embeds_mask = pad_prompts(batch, noise)
        tokens = latents.shape[1]
        return TrainingInputs(
            transformer_kwargs={
                "hidden_states": torch.cat([noisy, controls], dim=1),
                "timestep": sigmas.to(noise),
                "guidance": None,
                "encoder_hidden_states_mask": prompt_embeds_mask,
                "encoder_hidden_states": prompt_embeds,
                "img_shapes": img_shapes,
            },
            target=target,
            select=lambda output: output[:, :tokens],
        )


@cache
def _template() -> Mapping[str, Any]:
    """What the pipeline puts around a prompt, as recipe values."""
    from diffusers import QwenImageEditPlusPipeline

    pipe = QwenImageEditPlusPipeline(None, None, None, None, None, None)
    digest = hashlib.blake2b(pipe.prompt_template_encode.encode(), digest_size=16).hexdigest()
    return {"template": digest, "drop_tokens": pipe.prompt_template_encode_start_idx}


def _dimensions(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) that the pipeline gives a control picture of this size, for an area of `resolution` squared."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    new_width, new_height = calculate_dimensions(resolution**2, width / height)
    return int(new_width), int(new_height)


def _picture_shapes(sample: Sample, sizes: Sizes) -> torch.Tensor:
    """`(1 + controls, 3)` int32: frames, height and width in packed latents, the target first."""
    pictures = [sample.size, *(_dimensions(*picture_size(path), sizes.resolution) for path in sample.controls)]
    shapes = [(1, height // PACKED_PIXELS, width // PACKED_PIXELS) for width, height in pictures]
    return torch.tensor(shapes, dtype=torch.int32)


def _encode_pictures(pipe: Any, samples: Sequence[Sample], sizes: Sizes) -> list[Tensors]:
    if pipe.vae_scale_factor * 2 != PACKED_PIXELS:
        raise ModelError(
            f"the VAE makes one packed latent of {pipe.vae_scale_factor * 2} pixels a side; expected {PACKED_PIXELS}"
        )
    known: dict[Any, torch.Tensor] = {}
    tensors = []
    for sample in samples:
        target_key = (sample.target, sample.size)
        if target_key not in known:
            width, height = sample.size
            picture = pipe.image_processor.preprocess(open_picture(sample.target), height, width)
            known[target_key] = _packed_latents(pipe, [picture])
        if sample.controls not in known:
            pictures = []
            for path in sample.controls:
                control = open_picture(path)
                width, height = _dimensions(*control.size, sizes.resolution)
                pictures.append(pipe.image_processor.preprocess(control, height, width))
            known[sample.controls] = _packed_latents(pipe, pictures)
        tensors.append({"image_latents": known[target_key], "control_latents": known[sample.controls]})
    return tensors


def _packed_latents(pipe: Any, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """Packed latents `(tokens, 64)` of preprocessed pictures `(1, 3, H, W)`, concatenated along the sequence."""
    _, latents = pipe.prepare_latents(
        images=[picture.unsqueeze(2) for picture in pictures],  # (1, 3, 1, H, W): a video of one frame
        batch_size=1,
        num_channels_latents=pipe.latent_channels,
        height=0,
        width=0,
        dtype=pipe.vae.dtype,
        device=pipe.vae.device,
        generator=None,
        latents=torch.empty(0),  # else it would draw noise too
    )
    packed: torch.Tensor = latents[0]
    return packed


def _encode_prompts(pipe: Any, samples: Sequence[Sample], sizes: Sizes, empty_prompts: bool) -> list[Tensors]:
    known: dict[tuple[Any, str], tuple[torch.Tensor, torch.Tensor]] = {}
    tensors = []
    for sample in samples:
        pictures: list[Any] | None = None
        sample_tensors: Tensors = {}
        prompts = {"": sample.prompt} | ({"empty_": EMPTY_PROMPT} if empty_prompts else {})
        for prefix, prompt in prompts.items():
            key = (sample.controls, prompt)
            if key not in known:
                if pictures is None:
                    pictures = [_condition_picture(pipe, path, sizes) for path in sample.controls]
                known[key] = _prompt_embeds(pipe, prompt, pictures)
            embeds, mask = known[key]
            sample_tensors |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}
        tensors.append(sample_tensors)
    return tensors


def _condition_picture(pipe: Any, path: Any, sizes: Sizes) -> Any:
    picture = open_picture(path)
    width, height = _dimensions(*picture.size, sizes.condition_resolution)
    return pipe.image_processor.resize(picture, height, width)


def _prompt_embeds(pipe: Any, prompt: str, pictures: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings `(T, D)` and their mask `(T,)`: all true, since a single prompt is not padded."""
    embeds, mask = pipe.encode_prompt(prompt=prompt, image=pictures, device=pipe.text_encoder.device)
    if mask is None:  # the pipeline's word for "all tokens are valid"
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return embeds[0], mask[0].to(torch.bool)
