"""Qwen-Image: text to image. Encoding side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dittocache.data.sample import Sample
from dittocache.errors import DataError
from dittocache.families.base import Sizes
from dittocache.families.packed_latents import PACKED_PIXELS
from dittocache.families.pictures import PictureRequest
from dittocache.families.qwen_image_common import QwenImageFamily
from dittocache.families.qwen_image_encoding import Row, unpadded

MAX_SEQUENCE_LENGTH = 512  # tokens of a prompt that the pipeline's call keeps by default


class QwenImage(QwenImageFamily):
    """Encoding side of Qwen-Image."""

    name = "qwen-image"
    pipeline_class_name = "QwenImagePipeline"
    encoders: Mapping[str, tuple[str, ...]] = {"vae": (), "text_encoder": ("tokenizer",)}
    size_multiple = PACKED_PIXELS

    def check_pictures(self, sample: Sample) -> None:
        """Raise DataError where there are control pictures."""
        if sample.controls:
            raise DataError(
                f"sample {sample.name!r} has control pictures, which {self.name} cannot use: it makes pictures from "
                "text alone; remove them, or choose a checkpoint that edits"
            )

    def condition_pictures(self, sample: Sample, sizes: Sizes) -> list[PictureRequest]:
        """None."""
        return []

    def prompt_facts(self) -> dict[str, Any]:
        """The template, how many tokens are dropped, and how many are kept at most."""
        return {**super().prompt_facts(), "max_sequence_length": MAX_SEQUENCE_LENGTH}

    def embed_prompts(self, pipe: Any, rows: Sequence[Row]) -> Sequence[torch.Tensor]:
        """Prompt embeddings `(T, D)` of each row by the pipeline's own method."""
        prompts = [prompt for _, prompt in rows]
        device = pipe.text_encoder.device
        return unpadded(*pipe.encode_prompt(prompt=prompts, device=device, max_sequence_length=MAX_SEQUENCE_LENGTH))
