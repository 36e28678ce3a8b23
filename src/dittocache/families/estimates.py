"""How large a sample's artifacts will be, told from sizes, words and configurations before anything is encoded.

Latents follow exactly from the sizes of pictures. Prompt embeddings have a row for each token: the tokenizer counts the
words, and the vision-language model has a token for every patch of the pictures shown to it. No weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dittocache.data.sample import Sample
from dittocache.errors import ModelError
from dittocache.families import flux_encoding, qwen_image_edit_plus
from dittocache.families.base import Sizes
from dittocache.families.flux_kontext import FluxKontext
from dittocache.families.pictures import fitted_size

SizeOf = Callable[[Path], tuple[int, int]]


class ArtifactSize(NamedTuple):
    """A tensor to come.

    Attributes:
        rows, width: its shape; masks and shapes have rows only by their own width.
        element_bytes: of one element; None for the dtype that the encoder computes in.
        shared_rows: those of its rows that it will probably share with the empty prompt's.
    """

    rows: int
    width: int
    element_bytes: int | None = None
    shared_rows: int = 0


class SizeEstimator(Protocol):
    """Tells sizes for one family and checkpoint."""

    def latent_sizes(self, sample: Sample, sizes: Sizes, size_of: SizeOf) -> Mapping[str, ArtifactSize]:
        """The artifacts that no text takes part in, exactly."""
        ...

    def text_sizes(self, sample: Sample, sizes: Sizes, size_of: SizeOf) -> Mapping[str, ArtifactSize]:
        """The artifacts of the text encoders, by the number of tokens."""
        ...


def size_estimator(family_name: str, model: Path) -> SizeEstimator | None:
    """The estimator of a family for the checkpoint in the folder `model`; None for a family that has none."""
    estimators: dict[str, Callable[[Path], SizeEstimator]] = {
        "qwen-image-edit-plus": QwenImageEditPlusSizes,
        "flux": FluxSizes,
        "flux-schnell": FluxSizes,
        "flux-kontext": FluxSizes,
    }
    return estimators[family_name](model) if family_name in estimators else None


class QwenImageEditPlusSizes:
    """Sizes for Qwen-Image-Edit-Plus."""

    def __init__(self, model: Path) -> None:
        self._model = model

    def latent_sizes(self, sample: Sample, sizes: Sizes, size_of: SizeOf) -> Mapping[str, ArtifactSize]:
        """`image_latents`, `control_latents` and `img_shapes`."""
        area, multiple = sizes.resolution**2, qwen_image_edit_plus.CONTROL_MULTIPLE
        controls = [fitted_size(*size_of(path), area, multiple) for path in sample.controls]
        packed = qwen_image_edit_plus.PACKED_PIXELS
        return {
            "image_latents": ArtifactSize(_tokens(sample.size, packed), self._channels),
            "control_latents": ArtifactSize(sum(_tokens(size, packed) for size in controls), self._channels),
            "img_shapes": ArtifactSize(1 + len(controls), 3, element_bytes=4),
        }

    def text_sizes(self, sample: Sample, sizes: Sizes, size_of: SizeOf) -> Mapping[str, ArtifactSize]:
        """The prompt's and the empty prompt's embeddings and masks."""
        area, multiple = sizes.condition_resolution**2, qwen_image_edit_plus.CONTROL_MULTIPLE
        pictures = [fitted_size(*size_of(path), area, multiple) for path in sample.controls]
        before, after = self._surroundings(len(pictures))
        before += sum(self._vision_tokens(*size) for size in pictures)
        words = len(self._tokenizer(sample.prompt)["input_ids"])
        empty, rows = before + after, before + words + after
        return {
            "prompt_embeds": ArtifactSize(rows, self._width, shared_rows=before),
            "prompt_embeds_mask": ArtifactSize(rows, 1, element_bytes=1),
            "empty_prompt_embeds": ArtifactSize(empty, self._width),
            "empty_prompt_embeds_mask": ArtifactSize(empty, 1, element_bytes=1),
        }

    @cached_property
    def _channels(self) -> int:
        return 4 * int(_field(self._model / "vae/config.json", "z_dim"))

    @cached_property
    def _width(self) -> int:
        config = self._model / "text_encoder/config.json"
        return int(_field(config, "text_config", "hidden_size") or _field(config, "hidden_size"))

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(str(self._model), subfolder="tokenizer")

    @cached_property
    def _image_processor(self) -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil.from_pretrained(str(self._model), subfolder="processor")

    @cached_property
    def _template(self) -> tuple[str, int]:
        from diffusers import QwenImageEditPlusPipeline

        pipe = QwenImageEditPlusPipeline(None, None, None, None, None, None)
        return pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx

    def _surroundings(self, pictures: int) -> tuple[int, int]:
        """Tokens before and after the words, without those of the pictures themselves."""
        if pictures not in self._known_surroundings:
            template, dropped = self._template
            head, tail = template.split("{}")
            named = "".join(f"Picture {number + 1}: <|vision_start|><|vision_end|>" for number in range(pictures))
            before, after = (len(self._tokenizer(text)["input_ids"]) for text in (head + named, tail))
            self._known_surroundings[pictures] = before - dropped, after
        return self._known_surroundings[pictures]

    @cached_property
    def _known_surroundings(self) -> dict[int, tuple[int, int]]:
        return {}

    def _vision_tokens(self, width: int, height: int) -> int:
        processor = self._image_processor
        patches = int(processor.get_number_of_image_patches(height, width, {}))
        return patches // int(processor.merge_size) ** 2


class FluxSizes:
    """Sizes for FLUX.1 and, with references, Kontext."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._family = FluxKontext()

    def latent_sizes(self, sample: Sample, sizes: Sizes, size_of: SizeOf) -> Mapping[str, ArtifactSize]:
        """`image_latents`, `img_shapes`, and `control_latents` where there is a reference."""
        known = {
            "image_latents": ArtifactSize(_tokens(sample.size, flux_encoding.PACKED_PIXELS), self._channels),
            "img_shapes": ArtifactSize(1 + len(sample.controls), 3, element_bytes=4),
        }
        if sample.controls:
            requests = self._family.controls(sample, sizes, size_of)
            tokens = sum(_tokens(request.size, flux_encoding.PACKED_PIXELS) for request in requests if request.size)
            known["control_latents"] = ArtifactSize(tokens, self._channels)
        return known

    def text_sizes(self, sample: Sample, sizes: Sizes, size_of: SizeOf) -> Mapping[str, ArtifactSize]:
        """Both encoders' embeddings, which do not depend on the number of words."""
        pooled = ArtifactSize(1, self._pooled)
        sequence = ArtifactSize(flux_encoding.MAX_SEQUENCE_LENGTH, self._width)
        return {
            "pooled_prompt_embeds": pooled,
            "empty_pooled_prompt_embeds": pooled,
            "prompt_embeds": sequence,
            "empty_prompt_embeds": sequence,
        }

    @cached_property
    def _channels(self) -> int:
        return 4 * int(_field(self._model / "vae/config.json", "latent_channels"))

    @cached_property
    def _pooled(self) -> int:
        return int(_field(self._model / "text_encoder/config.json", "hidden_size"))

    @cached_property
    def _width(self) -> int:
        return int(_field(self._model / "text_encoder_2/config.json", "d_model"))


def _tokens(size: tuple[int, int], packed_pixels: int) -> int:
    return (size[0] // packed_pixels) * (size[1] // packed_pixels)


def _field(config: Path, *names: str) -> Any:
    """A field of a configuration; None where it is not there."""
    try:
        value = json.loads(config.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{config} cannot be read ({error}); download the checkpoint again") from error
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
