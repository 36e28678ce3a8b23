"""Qwen-Image-Edit, the first one. Encoding side.

It edits exactly one picture, which the VAE and the text encoder see at the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dittocache.data.sample import Sample
from dittocache.errors import DataError
from dittocache.families.base import Sizes
from dittocache.families.pictures import PictureRequest
from dittocache.families.qwen_image_common import QwenImageFamily
from dittocache.families.qwen_image_encoding import CONTROL_MULTIPLE, Row, unpadded


class QwenImageEdit(QwenImageFamily):
    """Encoding side of Qwen-Image-Edit; `Sizes.condition_resolution` plays no part."""

    name = "qwen-image-edit"
    pipeline_class_name = "QwenImageEditPipeline"
    size_multiple = CONTROL_MULTIPLE

    def check_pictures(self, sample: Sample) -> None:
        """Raise DataError where there is not exactly one control picture."""
        if len(sample.controls) != 1:
            raise DataError(
                f"sample {sample.name!r} has {len(sample.controls)} control pictures; {self.name} edits exactly one: "
                "give one, or choose qwen-image-edit-plus for several, qwen-image for none"
            )

    def condition_pictures(self, sample: Sample, sizes: Sizes) -> list[PictureRequest]:
        """The control as the VAE takes it."""
        return self.controls(sample, sizes)

    def embed_prompts(self, pipe: Any, rows: Sequence[Row]) -> Sequence[torch.Tensor]:
        """Prompt embeddings `(T, D)` of each row by the pipeline's own method: one picture a prompt."""
        prompts, pictures = [prompt for _, prompt in rows], [picture for [picture], _ in rows]
        return unpadded(*pipe.encode_prompt(prompt=prompts, image=pictures, device=pipe.text_encoder.device))
