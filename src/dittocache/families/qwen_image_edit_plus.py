"""Qwen-Image-Edit-Plus: Qwen-Image-Edit-2509, and 2511 with `zero_cond_t`. Encoding side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dittocache.data.sample import Sample
from dittocache.errors import DataError
from dittocache.families.base import Sizes
from dittocache.families.encoding import without_padding
from dittocache.families.pictures import PictureRequest
from dittocache.families.qwen_image_common import QwenImageFamily, control_request
from dittocache.families.qwen_image_encoding import CONTROL_MULTIPLE, Row

_PICTURE_TEMPLATE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"  # the pipeline's, before the words


class QwenImageEditPlus(QwenImageFamily):
    """Encoding side of Qwen-Image-Edit-Plus; one instance serves every checkpoint of the family."""

    name = "qwen-image-edit-plus"
    pipeline_class_name = "QwenImageEditPlusPipeline"
    size_multiple = CONTROL_MULTIPLE

    def check_pictures(self, sample: Sample) -> None:
        """Raise DataError where there is no control picture."""
        if not sample.controls:
            raise DataError(
                f"sample {sample.name!r} has no control picture; {self.name} edits pictures: give at least one, "
                "or choose a text-to-image family"
            )

    def condition_pictures(self, sample: Sample, sizes: Sizes) -> list[PictureRequest]:
        """All controls, at the condition size."""
        return [control_request(sample, path, sizes.condition_resolution) for path in sample.controls]

    def words_before(self, pictures: int) -> str:
        """A numbered placeholder for each picture."""
        return "".join(_PICTURE_TEMPLATE.format(number + 1) for number in range(pictures))

    def embed_prompts(self, pipe: Any, rows: Sequence[Row]) -> Sequence[torch.Tensor]:
        """Prompt embeddings `(T, D)` of each row; of a single row by the pipeline's own method."""
        if len(rows) > 1:
            return self._padded_prompt_embeds(pipe, rows)
        [(pictures, prompt)] = rows
        embeds, _ = pipe.encode_prompt(prompt=prompt, image=list(pictures), device=pipe.text_encoder.device)
        return [embeds[0]]

    def _padded_prompt_embeds(self, pipe: Any, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Prompt embeddings `(T, D)` of each row from one padded batch.

        The pipeline's method shows every prompt of a batch the same pictures; these are its steps for pictures of their
        own. A conformance test holds the two equal within rounding.
        """
        texts = [
            pipe.prompt_template_encode.format(self.words_before(len(pictures)) + prompt) for pictures, prompt in rows
        ]
        images = [picture for pictures, _ in rows for picture in pictures]
        device = pipe.text_encoder.device
        inputs = pipe.processor(text=texts, images=images, padding=True, return_tensors="pt").to(device)
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        outputs = pipe.text_encoder(**{name: inputs.get(name) for name in names}, output_hidden_states=True)
        embeds = without_padding(outputs.hidden_states[-1], inputs["attention_mask"])
        return [one[pipe.prompt_template_encode_start_idx :].to(pipe.text_encoder.dtype) for one in embeds]
