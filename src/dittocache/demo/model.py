"""Load the bundled model: a small Qwen-Image-Edit-Plus of the real classes, trained by `dittocache.demo.train`."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dittocache.families.qwen_processor import StillImageProcessor

ASSETS = Path(__file__).parent / "assets"
MODEL_DIR = ASSETS / "model"
SAMPLES_DIR = ASSETS / "samples"


def load_processor(folder: Path = MODEL_DIR) -> StillImageProcessor:
    """Build the processor from a model folder without torchvision."""
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    return StillImageProcessor(image_processor, tokenizer)


def load_pipeline(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", folder: Path = MODEL_DIR
) -> QwenImageEditPlusPipeline:
    """Load the bundled pipeline, its weights widened from 16 bits on disk to `dtype`.

    Call it inside `dittocache.demo.sizes.pipeline_sizes()` with `height=128, width=128`: the stock defaults are
    1024x1024. Raises FileNotFoundError where the model folder is missing.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model_index.json; the bundled model is missing. "
            "Train it with `python -m dittocache.demo.train all`"
        )
    processor = load_processor(folder)
    pipeline = QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae", dtype=dtype),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype),
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
