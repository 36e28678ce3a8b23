"""One process of a run on several (not a test): `python distributed_worker.py FOLDER`, ranks from the environment.

For each case in FOLDER/cases.json trains on the tensors in FOLDER/samples.pt and writes losses, norms and LoRA.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.training.conftest import MemoryReader

from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import StageError
from dittocache.families.registry import get_family
from dittocache.training.accelerator import make_accelerator
from dittocache.training.config import TrainConfig
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora
from dittocache.training.sources import CachedSource


def run_case(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Train and write `NAME.json` and `NAME.safetensors`; `bad` among the settings names a sample to be spoilt."""
    family = get_family("qwen-image-edit-plus")
    tensors = torch.load(folder / "samples.pt", weights_only=True)
    bad = settings.get("bad")
    if bad is not None:
        tensors[bad]["image_latents"] *= torch.nan
    config = TrainConfig.model_validate({key: value for key, value in settings.items() if key != "bad"})
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    add_lora(transformer, family, config)
    accelerator = make_accelerator(config, "cpu")
    run = train_lora(
        transformer,
        family,
        CachedSource(MemoryReader(tensors)),
        list(tensors),
        config,
        accelerator,
        caption_dropout=0.3,
        checkpoint_dir=folder / f"checkpoints-{name}",
    )
    try:
        states = list(run)
    except StageError as error:
        (folder / f"{name}-{accelerator.process_index}.txt").write_text(str(error))
        return
    if accelerator.is_main_process:
        weights = {key: one.detach().clone() for key, one in transformer.named_parameters() if "lora_" in key}
        save_file(weights, folder / f"{name}.safetensors")
        outcome = {"losses": [state.loss for state in states], "norms": [state.grad_norm for state in states]}
        (folder / f"{name}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    for case_name, case in json.loads((Path(sys.argv[1]) / "cases.json").read_text()).items():
        run_case(Path(sys.argv[1]), case_name, case)
