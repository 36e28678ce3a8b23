"""The still-image processor gives what the pipeline needs, without torchvision."""

from __future__ import annotations

import pytest
from PIL import Image

from dittocache.demo.tiny import tiny_pipeline
from dittocache.families.qwen_processor import IMAGE_TOKEN, image_backend


def test_each_picture_becomes_one_token_a_merged_patch() -> None:
    processor = tiny_pipeline("qwen-image-edit-plus").processor
    pictures = [Image.new("RGB", (64, 64)), Image.new("RGB", (96, 32))]
    inputs = processor(text=f"one {IMAGE_TOKEN} two {IMAGE_TOKEN}", images=pictures, padding=True)
    token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert int((inputs["input_ids"] == token).sum()) == 4 + 3
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 2, 6]]
    assert inputs["pixel_values"].shape == (16 + 12, 3 * 2 * 16 * 16)


def test_pictures_without_a_place_are_an_error() -> None:
    processor = tiny_pipeline("qwen-image-edit-plus").processor
    with pytest.raises(ValueError, match="hold 0 .* placeholders but 1 images"):
        processor(text="no place", images=[Image.new("RGB", (64, 64))])


def test_the_recipe_says_which_library_resizes() -> None:
    try:
        import torchvision  # noqa: F401

        expected = "torchvision"
    except ImportError:
        expected = "pil"
    assert image_backend() == expected
