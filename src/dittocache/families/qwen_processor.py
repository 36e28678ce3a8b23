"""The vision-language processor of the Qwen-Image edit pipelines, also on machines without torchvision."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import BatchFeature, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

IMAGE_TOKEN = "<|image_pad|>"


# diffusers accepts no other base class for `processor=`.
class StillImageProcessor(ProcessorMixin):  # type: ignore[misc]
    """Tokenize text with image placeholders as `Qwen2VLProcessor` does, for still images only.

    The stock class imports torchvision for its video part even where no video is given. This one gives the same
    `input_ids`, `attention_mask`, `pixel_values` and `image_grid_thw`, with the stock PIL image processor.
    """

    def __init__(self, image_processor: Qwen2VLImageProcessorPil, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__(image_processor=image_processor, tokenizer=tokenizer)

    def __call__(
        self,
        text: str | list[str],
        images: Image.Image | list[Image.Image] | None = None,
        padding: bool | str = False,
        return_tensors: str = "pt",
        **_: Any,
    ) -> BatchFeature:
        """Return the text encoder's inputs.

        `input_ids` and `attention_mask` are (batch, tokens) int64; with images also `pixel_values`
        (patches, 3 * temporal patch * patch * patch) float32 and `image_grid_thw` (images, 3) int64. Raises
        ValueError where placeholders and images differ in number.
        """
        texts = [text] if isinstance(text, str) else list(text)
        features: dict[str, Any] = {}
        token_counts: list[int] = []
        if images is not None:
            stills = images if isinstance(images, list) else [images]
            features = dict(self.image_processor(images=stills, return_tensors=return_tensors))
            merged = self.image_processor.merge_size**2
            token_counts = [int(grid.prod()) // merged for grid in features["image_grid_thw"]]
        # As in the stock processor, images are consumed in reading order across the whole list of texts.
        wanted = sum(one.count(IMAGE_TOKEN) for one in texts)
        if wanted != len(token_counts):
            raise ValueError(
                f"the texts hold {wanted} {IMAGE_TOKEN} placeholders but {len(token_counts)} images were given; "
                "pass one image for each placeholder"
            )
        counts = iter(token_counts)
        expanded = []
        for one in texts:
            first, *rest = one.split(IMAGE_TOKEN)
            expanded.append(first + "".join(IMAGE_TOKEN * next(counts) + piece for piece in rest))
        encoded = self.tokenizer(expanded, padding=padding, return_tensors=return_tensors)
        return BatchFeature(
            {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], **features}
        )

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **_: Any) -> None:
        """Write the files that the stock `Qwen2VLProcessor.from_pretrained` reads."""
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)


def image_backend() -> str:
    """Which library resizes the pictures that the text encoder sees here: `torchvision` or `pil`.

    transformers takes torchvision where it is installed; their resampling differs in the last bits, so the word
    belongs to the recipe of every prompt embedding that depends on a picture.
    """
    return "torchvision" if is_torchvision_available() else "pil"


def load_still_image_processor(model: str) -> StillImageProcessor:
    """Build the processor of a checkpoint (folder or hub id) from its `processor` and `tokenizer` parts."""
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(model, subfolder="processor")
    tokenizer = Qwen2Tokenizer.from_pretrained(model, subfolder="tokenizer")
    return StillImageProcessor(image_processor, tokenizer)
