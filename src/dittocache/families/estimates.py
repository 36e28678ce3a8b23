"""How large a sample's artifacts will be, told from sizes, words and configurations before anything is encoded.

Latents follow exactly from the sizes of pictures. Prompt embeddings have a row for each token: the tokenizer counts the
words, and the vision-language model has a token for every patch of the pictures shown to it. No weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dittocache.data.sample import Sample
from dittocache.errors import ModelError
from dittocache.families import flux_encoding
from dittocache.families.base import Sizes
from dittocache.families.flux_kontext import FluxKontext
from dittocache.families.loss_masks import LOSS_MASK
from dittocache.families.packed_latents import PACKED_PIXELS
from dittocache.families.pictures import requested_size
from dittocache.families.qwen_image import MAX_SEQUENCE_LENGTH, QwenImage
from dittocache.families.qwen_image_common import QwenImageFamily
from dittocache.families.qwen_image_edit import QwenImageEdit
from dittocache.families.qwen_image_edit_plus import QwenImageEditPlus
from dittocache.families.qwen_image_encoding import prompt_template

SizeOf = Callable[[Path], tuple[int, int]]

_QWEN_IMAGE: tuple[QwenImageFamily, ...] = (QwenImage(), QwenImageEdit(), QwenImageEditPlus())
_IMAGE_TOKEN = "<|image_pad|>"  # stands for as many tokens as its picture has


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
        **{family.name: partial(QwenImageSizes, family=family) for family in _QWEN_IMAGE},
        "flux": FluxSizes,
        "flux-schnell": FluxSizes,
        "flux-kontext": FluxSizes,
    }
    return estimators[family_name](model) if family_name in estimators else None


class QwenImageSizes:
    """Sizes for Qwen-Image and its edit models."""

    def __init__(self, model: Path, family: QwenImageFamily) -> None:
        self._model = model
        self._family = family

    def latent_sizes(self, sample: Sample, sizes: Sizes, size_of: SizeOf) -> Mapping[str, ArtifactSize]:
        """`image_latents`, `img_shapes`, and `control_latents` and `loss_mask` where there are such pictures."""
        target = _tokens(sample.size, PACKED_PIXELS)
        controls = [
            _tokens(requested_size(one, size_of), PACKED_PIXELS) for one in self._family.controls(sample, sizes)
        ]
        known = {
            "image_latents": ArtifactSize(target, self._channels),
            "img_shapes": ArtifactSize(1 + len(controls), 3, element_bytes=4),
        }
        if controls:
            known["control_latents"] = ArtifactSize(sum(controls), self._channels)
        return {**known, **_mask_size(sample, target)}

    def text_sizes(self, sample: Sample, sizes: Sizes, size_of: SizeOf) -> Mapping[str, ArtifactSize]:
        """The prompt's and the empty prompt's embeddings and masks."""
        pictures = [requested_size(one, size_of) for one in self._family.condition_pictures(sample, sizes)]
        before, after = self._surroundings(len(pictures))
        before += sum(self._vision_tokens(*size) for size in pictures)
        words = len(self._tokenizer(sample.prompt)["input_ids"])
        empty, rows = before + after, before + words + after
        if not pictures:
            rows = min(rows, MAX_SEQUENCE_LENGTH)  # the edit pipelines cut nothing
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

    def _surroundings(self, pictures: int) -> tuple[int, int]:
        """Tokens before and after the words, without those of the pictures themselves."""
        if pictures not in self._known_surroundings:
            template, dropped = prompt_template(self._family.pipeline_class_name)
            head, tail = template.split("{}")
            head = (head + self._family.words_before(pictures)).replace(_IMAGE_TOKEN, "")
            before, after = (len(self._tokenizer(text)["input_ids"]) for text in (head, tail))
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
        """`image_latents`, `img_shapes`, and `control_latents` and `loss_mask` where there are such pictures."""
        target = _tokens(sample.size, PACKED_PIXELS)
        known = {
            "image_latents": ArtifactSize(target, self._channels),
            "img_shapes": ArtifactSize(1 + len(sample.controls), 3, element_bytes=4),
            **_mask_size(sample, target),
        }
        if sample.controls:
            requests = self._family.controls(sample, sizes, size_of)
            tokens = sum(_tokens(request.size, PACKED_PIXELS) for request in requests if request.size)
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


def _mask_size(sample: Sample, tokens: int) -> Mapping[str, ArtifactSize]:
    """`loss_mask` of a sample that has a mask."""
    return {} if sample.mask is None else {LOSS_MASK: ArtifactSize(tokens, 1, element_bytes=4)}


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
