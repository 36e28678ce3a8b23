"""Qwen-Image-Edit-Plus: Qwen-Image-Edit-2509, and 2511 with `zero_cond_t`. Encoding side.

Every tensor is computed by methods of diffusers' `QwenImageEditPlusPipeline`, with the calls that its own `__call__`
makes, so that a cached tensor is the tensor that the pipeline would have computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.errors import DataError, ModelError
from dittocache.families.base import Artifact, ArtifactInput, Sizes, Tensors, TrainingInputs, TransformerAdapter
from dittocache.families.encoding import encode_distinct, is_wanted, without_padding
from dittocache.families.flow_matching import interpolate, pad_prompts, picture_shapes, stack
from dittocache.families.loading import load_components
from dittocache.families.pictures import (
    READING,
    RESAMPLING,
    PictureRequest,
    Pictures,
    fitted_size,
    resized_picture,
)
from dittocache.families.qwen_processor import image_backend, load_still_image_processor

EMPTY_PROMPT = ""  # the pipeline's template still surrounds it
PACKED_PIXELS = 16  # pixels a side of one packed latent token: 8 by the VAE, 2 by packing
CONTROL_MULTIPLE = 32  # the pipeline's calculate_dimensions rounds to it
_PICTURE_TEMPLATE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"  # the pipeline's, before the words


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

    def artifacts(
        self, sample: Sample, sizes: Sizes, size_of: Callable[[Path], tuple[int, int]] = picture_size
    ) -> Sequence[Artifact]:
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
            Artifact("img_shapes", None, (), {"shapes": _picture_shapes(sample, sizes, size_of)}),
        )

    def load_pipeline(
        self, model: str, components: Collection[str], dtype: torch.dtype, device: str | torch.device
    ) -> Any:
        """A `QwenImageEditPlusPipeline` with `components` only; raises ModelError when `model` is not one."""
        builders = {} if image_backend() == "torchvision" else {"processor": load_still_image_processor}
        return load_components(self.pipeline_class_name, model, components, dtype, device, builders)

    def pictures(
        self, encoder: str | None, sample: Sample, sizes: Sizes, wanted: Collection[str] | None = None
    ) -> Sequence[PictureRequest]:
        """Target and controls for the VAE, the controls at the condition size for the text encoder."""
        if encoder == "vae":
            by_artifact = {"image_latents": [_target(sample)], "control_latents": _controls(sample, sizes.resolution)}
            return [one for name in by_artifact if wanted is None or name in wanted for one in by_artifact[name]]
        if encoder == "text_encoder" and (wanted is None or wanted):
            return _controls(sample, sizes.condition_resolution)
        return []

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

        By default pictures and prompts pass the encoders one by one, as in the pipeline, which takes one prompt a call.
        A VAE batch of four differs from four single passes (measured on a CPU: 4e-7 in float32, 2e-3 in bfloat16), and
        so do padded prompts. What several samples share is encoded once a call.

        Raises DataError naming a picture that cannot be read, ModelError for an unknown encoder.
        """
        if encoder is None:
            return [
                {"img_shapes": torch.tensor(_picture_shapes(sample, sizes, picture_size), dtype=torch.int32)}
                if is_wanted(wanted, index, "img_shapes")
                else {}
                for index, sample in enumerate(samples)
            ]
        largest_batch = max(len(samples), 1) if together else 1
        if encoder == "vae":
            return _encode_pictures(pipe, samples, sizes, wanted, pictures, largest_batch)
        if encoder == "text_encoder":
            return _encode_prompts(pipe, samples, sizes, wanted, pictures, largest_batch)
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


def _target(sample: Sample) -> PictureRequest:
    return PictureRequest(sample.target, size=sample.size)


def _controls(sample: Sample, resolution: int) -> list[PictureRequest]:
    """The controls as the pipeline resizes them to an area of `resolution` squared."""
    return [PictureRequest(path, area=resolution**2, multiple=CONTROL_MULTIPLE) for path in sample.controls]


def _picture_shapes(
    sample: Sample, sizes: Sizes, size_of: Callable[[Path], tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """Frames, height and width in packed latents of the target and of each control."""
    area = sizes.resolution**2
    pictures = [sample.size, *(fitted_size(*size_of(path), area, CONTROL_MULTIPLE) for path in sample.controls)]
    return [(1, height // PACKED_PIXELS, width // PACKED_PIXELS) for width, height in pictures]


def _encode_pictures(
    pipe: Any,
    samples: Sequence[Sample],
    sizes: Sizes,
    wanted: Sequence[Collection[str]] | None,
    pictures: Pictures,
    largest_batch: int,
) -> list[Tensors]:
    if pipe.vae_scale_factor * 2 != PACKED_PIXELS:
        raise ModelError(
            f"the VAE makes one packed latent of {pipe.vae_scale_factor * 2} pixels a side; expected {PACKED_PIXELS}"
        )
    requests: list[dict[str, Sequence[PictureRequest]]] = []
    for index, sample in enumerate(samples):
        by_artifact = {"image_latents": [_target(sample)], "control_latents": _controls(sample, sizes.resolution)}
        requests.append({name: parts for name, parts in by_artifact.items() if is_wanted(wanted, index, name)})
    distinct = dict.fromkeys(one for by_artifact in requests for parts in by_artifact.values() for one in parts)
    preprocessed = {one: pipe.image_processor.preprocess(pictures(one)) for one in distinct}  # (1, 3, H, W) each
    latents = encode_distinct(
        distinct,
        lambda batch: _packed_latents(pipe, torch.cat([preprocessed[one] for one in batch])),
        largest_batch,
        alike=lambda one: preprocessed[one].shape,
    )
    return [
        {name: torch.cat([latents[one] for one in parts]) for name, parts in by_artifact.items()}
        for by_artifact in requests
    ]


def _packed_latents(pipe: Any, pictures: torch.Tensor) -> Sequence[torch.Tensor]:
    """Packed latents `(tokens, 64)` of each preprocessed picture of `(B, 3, H, W)`."""
    _, latents = pipe.prepare_latents(
        images=[pictures.unsqueeze(2)],  # (B, 3, 1, H, W): videos of one frame
        batch_size=len(pictures),
        num_channels_latents=pipe.latent_channels,
        height=0,
        width=0,
        dtype=pipe.vae.dtype,
        device=pipe.vae.device,
        generator=None,
        latents=torch.empty(0),  # else it would draw noise too
    )
    packed: torch.Tensor = latents
    return packed.unbind()


_Prompt = tuple[tuple[PictureRequest, ...], str]  # the condition pictures, and the words


def _encode_prompts(
    pipe: Any,
    samples: Sequence[Sample],
    sizes: Sizes,
    wanted: Sequence[Collection[str]] | None,
    pictures: Pictures,
    largest_batch: int,
) -> list[Tensors]:
    prompts: list[dict[str, _Prompt]] = []  # by prefix of the artifacts' names
    for index, sample in enumerate(samples):
        controls = tuple(_controls(sample, sizes.condition_resolution))
        words = {"": sample.prompt, "empty_": EMPTY_PROMPT}
        prompts.append(
            {
                prefix: (controls, prompt)
                for prefix, prompt in words.items()
                if is_wanted(wanted, index, f"{prefix}prompt_embeds")
                or is_wanted(wanted, index, f"{prefix}prompt_embeds_mask")
            }
        )
    distinct = dict.fromkeys(prompt for by_prefix in prompts for prompt in by_prefix.values())
    opened = {one: pictures(one) for one in dict.fromkeys(one for controls, _ in distinct for one in controls)}

    def encode(batch: Sequence[_Prompt]) -> Sequence[torch.Tensor]:
        rows = [([opened[one] for one in controls], prompt) for controls, prompt in batch]
        return [_prompt_embeds(pipe, *rows[0])] if len(rows) == 1 else _padded_prompt_embeds(pipe, rows)

    known = encode_distinct(distinct, encode, largest_batch)
    tensors: list[Tensors] = []
    for index, by_prefix in enumerate(prompts):
        sample_tensors: Tensors = {}
        for prefix, key in by_prefix.items():
            embeds = known[key]
            # All true: neither a single prompt nor what is left of a batch without its padding is padded.
            mask = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device)
            both = {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}
            sample_tensors |= {name: tensor for name, tensor in both.items() if is_wanted(wanted, index, name)}
        tensors.append(sample_tensors)
    return tensors


def _prompt_embeds(pipe: Any, pictures: list[Any], prompt: str) -> torch.Tensor:
    """Prompt embeddings `(T, D)` by the pipeline's own method."""
    embeds, _ = pipe.encode_prompt(prompt=prompt, image=pictures, device=pipe.text_encoder.device)
    one: torch.Tensor = embeds[0]
    return one


def _padded_prompt_embeds(pipe: Any, rows: Sequence[tuple[list[Any], str]]) -> list[torch.Tensor]:
    """Prompt embeddings `(T, D)` of each row from one padded batch.

    The pipeline's method shows every prompt of a batch the same pictures; these are its steps for pictures of their
    own. A conformance test holds the two equal within rounding.
    """
    texts = [
        pipe.prompt_template_encode.format(
            "".join(_PICTURE_TEMPLATE.format(number + 1) for number in range(len(pictures))) + prompt
        )
        for pictures, prompt in rows
    ]
    images = [picture for pictures, _ in rows for picture in pictures]
    inputs = pipe.processor(text=texts, images=images, padding=True, return_tensors="pt").to(pipe.text_encoder.device)
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    outputs = pipe.text_encoder(**{name: inputs.get(name) for name in names}, output_hidden_states=True)
    embeds = without_padding(outputs.hidden_states[-1], inputs["attention_mask"])
    return [one[pipe.prompt_template_encode_start_idx :].to(pipe.text_encoder.dtype) for one in embeds]
