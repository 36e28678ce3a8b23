"""Write the parts of the model into one `from_pretrained` folder, each replaced as a whole."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import Qwen2Tokenizer

from dittocache.demo.train.configs import build_image_processor, build_scheduler

SHARD_SIZE = "6MB"  # every file stays under 8 MiB
WEIGHT_DTYPE = torch.float16  # 10 mantissa bits against bfloat16's 7; no weight comes near 65504

# The stock class names, so that plain `from_pretrained` works for everyone who has torchvision.
MODEL_INDEX = {
    "_class_name": "QwenImageEditPlusPipeline",
    "_diffusers_version": diffusers.__version__,
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def save_module(module: nn.Module, folder: Path) -> None:
    """Save a diffusers or transformers model in 16 bits to `folder`, which is replaced only when complete.

    Raises ValueError where a weight is not finite in 16 bits. The module itself keeps its dtype.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.to(WEIGHT_DTYPE)).all():
            raise ValueError(f"{name} is not finite in {WEIGHT_DTYPE}; train longer or save in bfloat16")
    narrow = copy.deepcopy(module).to(WEIGHT_DTYPE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "fresh"
        narrow.save_pretrained(fresh, max_shard_size=SHARD_SIZE)  # type: ignore[operator]
        for file in fresh.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner reads
        _replace(fresh, folder, Path(scratch) / "old")


def save_frame(model_dir: Path, tokenizer: Qwen2Tokenizer) -> None:
    """Write everything but the weights: model index, scheduler, tokenizer and processor."""
    model_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model_dir, prefix=".frame-") as scratch:
        root = Path(scratch)
        build_scheduler().save_pretrained(root / "scheduler")
        tokenizer.save_pretrained(root / "tokenizer")
        tokenizer.save_pretrained(root / "processor")
        image_processor = build_image_processor()
        settings: dict[str, Any] = json.loads(image_processor.to_json_string())
        settings.pop("_processor_class", None)
        common = {"processor_class": "Qwen2VLProcessor"}
        image = settings | common | {"image_processor_type": "Qwen2VLImageProcessor"}
        video = settings | common | {"video_processor_type": "Qwen2VLVideoProcessor"}
        video.pop("image_processor_type", None)
        _write_json(root / "processor" / "preprocessor_config.json", image)
        _write_json(root / "processor" / "video_preprocessor_config.json", video)
        for name in ("scheduler", "tokenizer", "processor"):
            _replace(root / name, model_dir / name, root / f"old-{name}")
        _write_json(root / "model_index.json", MODEL_INDEX)
        os.replace(root / "model_index.json", model_dir / "model_index.json")


def _replace(fresh: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
