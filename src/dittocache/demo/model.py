"""Load the bundled model: a small Qwen-Image-Edit-Plus of the real classes, trained by `dittocache.demo.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dittocache.errors import ModelError
from dittocache.families.base import Sizes
from dittocache.families.loading import component_names
from dittocache.families.registry import get_family

ASSETS = Path(__file__).parent / "assets"
MODEL_DIR = ASSETS / "model"
SAMPLES_DIR = ASSETS / "samples"
EXACT_LORA_DIR = ASSETS / "exact-lora"
"""A LoRA with isolated references, which the reference KV cache sees to once `pipe.load_lora_weights(EXACT_LORA_DIR)`
has loaded it; without that cache call `isolate_references(pipe)`."""

DEMO_SIZES = Sizes(resolution=128, condition_resolution=64)
"""What the model was trained on: 64 packed latent tokens a picture, 4 image tokens for the text encoder."""


def load_pipeline(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", folder: Path = MODEL_DIR
) -> Any:
    """Load the bundled `QwenImageEditPlusPipeline`, its weights widened from 16 bits on disk to `dtype`.

    Call it inside `pipeline_sizes(DEMO_SIZES)` with `height=128, width=128`: the stock defaults are 1024x1024. Raises
    ModelError where the model folder is missing.
    """
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} holds no model_index.json; the bundled model is missing. "
            "Train it with `python -m dittocache.demo.train all`"
        )
    family = get_family("qwen-image-edit-plus")
    return family.load_pipeline(str(folder), component_names(folder), dtype, device)
