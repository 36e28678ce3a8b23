"""The bundled model as files: stock classes load it, the templates fit, the sizes hold, the samples are complete."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import QwenImageEditPlusPipeline
from PIL import Image
from safetensors import safe_open

from dittocache.demo.edits import NEW_INSTRUCTION, PHRASES, instructions
from dittocache.demo.model import ASSETS, MODEL_DIR, SAMPLES_DIR, load_pipeline
from dittocache.demo.scenes import COLOURS, SHAPES
from dittocache.demo.train.tokenizer import prefix_lengths
from dittocache.errors import ModelError
from dittocache.families.qwen_processor import load_still_image_processor


@pytest.fixture(scope="module")
def processor():
    return load_still_image_processor(str(MODEL_DIR))


def test_template_prefixes_are_exactly_what_the_pipelines_drop(processor):
    assert prefix_lengths(processor.tokenizer) == {"edit_plus": (64, 64), "text_to_image": (34, 34)}


def test_every_word_of_the_task_is_one_token(processor):
    texts = [text for kind in PHRASES for text in instructions(kind)] + [NEW_INSTRUCTION]
    for text in texts:
        assert len(processor.tokenizer(text)["input_ids"]) == len(text.split()), text
    for word in (*COLOURS, *SHAPES):
        assert len(processor.tokenizer(" " + word)["input_ids"]) == 1


def test_the_model_index_names_stock_classes_only():
    index = json.loads((MODEL_DIR / "model_index.json").read_text())
    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = {name: value for name, value in index.items() if not name.startswith("_")}
    assert set(parts) == {"processor", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    for library, name in parts.values():
        assert hasattr(libraries[library], name)


def test_stock_from_pretrained_equals_load_pipeline(processor):
    stock = QwenImageEditPlusPipeline.from_pretrained(MODEL_DIR, processor=processor, dtype=torch.float32)
    ours = load_pipeline()
    assert stock.transformer.config.zero_cond_t is True
    for part in ("vae", "text_encoder", "transformer"):
        first, second = getattr(stock, part).state_dict(), getattr(ours, part).state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_are_sixteen_bit_finite_and_small():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    assert max(path.stat().st_size for path in files) < 8 * 2**20
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert weights
    for path in weights:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                assert tensor.dtype in (torch.float16, torch.bfloat16)
                assert torch.isfinite(tensor).all()


def test_a_missing_model_is_explained(tmp_path):
    with pytest.raises(ModelError, match=r"dittocache\.demo\.train all"):
        load_pipeline(folder=tmp_path)


def test_processor_expands_one_placeholder_an_image(processor):
    picture = Image.new("RGB", (64, 64), "red")
    text = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>make it gray"
    inputs = processor(text=[text, text], images=[picture, picture], padding=True, return_tensors="pt")
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (inputs["input_ids"] == pad).sum(dim=1).tolist() == [4, 4]
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    assert inputs["pixel_values"].shape == (32, 3 * 2 * 16 * 16)
    with pytest.raises(ValueError, match=r"1 <\|image_pad\|> placeholders but 2 images"):
        processor(text=text, images=[picture, picture])


@pytest.mark.parametrize(("split", "count"), [("train", 40), ("heldout", 12)])
def test_samples_are_complete(split: str, count: int):
    folder = Path(SAMPLES_DIR) / split
    targets = sorted((folder / "training_images").glob("*.png"))
    assert len(targets) == count
    for target in targets:
        control = folder / "control_images" / target.name
        for path in (target, control):
            with Image.open(path) as image:
                assert image.size == (128, 128)
                assert image.mode == "RGB"
        assert target.with_suffix(".txt").read_text().strip() == NEW_INSTRUCTION
