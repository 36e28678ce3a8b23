"""Checkpoints of a LoRA run: a folder a step, complete or absent.

    checkpoints/step-00000500/
        pytorch_lora_weights.safetensors   loads with `pipe.load_lora_weights(folder)`
        optimizer.safetensors              AdamW's moments, `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`
        state.json                         step, and the settings that the run's numbers depend on

A checkpoint is written to a temporary folder, flushed, and renamed. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dittocache.errors import ConfigError, ModelError
from dittocache.families.base import Family
from dittocache.training.lora import restore_lora, save_lora

OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
PREFIX = "step-"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / STATE_NAME).is_file())


def save_checkpoint(
    folder: Path,
    step: int,
    transformer: Any,
    family: Family,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
) -> Path:
    """Write the state after `step` optimizer steps; return the checkpoint's folder."""
    from safetensors.torch import save_file

    final = folder / f"{PREFIX}{step:08d}"
    if (final / STATE_NAME).is_file():
        return final
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_lora(transformer, family, temporary, {**settings, "step": step})
    moments = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in _trainable(transformer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(moments, temporary / OPTIMIZER_NAME)
    (temporary / STATE_NAME).write_text(json.dumps({"step": step, "settings": settings}, indent=2, sort_keys=True))
    for name in (OPTIMIZER_NAME, STATE_NAME):
        _flush(temporary / name)
    os.replace(temporary, final)
    _flush(folder)
    return final


def load_checkpoint(
    checkpoint: Path,
    transformer: Any,
    family: Family,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
) -> int:
    """Put weights and optimizer state back and return the number of steps taken.

    Raises ConfigError naming the settings that differ from the checkpoint's: such a run would not be a continuation.
    """
    from safetensors.torch import load_file

    state = json.loads((checkpoint / STATE_NAME).read_text())
    saved = state["settings"]
    problems = [
        f"{name}: the checkpoint has {saved.get(name)!r}, this run has {settings.get(name)!r}"
        for name in sorted({*saved, *settings})
        if saved.get(name) != settings.get(name)
    ]
    if problems:
        raise ConfigError(
            f"cannot resume from {checkpoint}: its settings differ; restore them, or start anew in another folder",
            problems,
        )
    restore_lora(transformer, family, checkpoint)
    trainable = _trainable(transformer)
    for key, value in load_file(checkpoint / OPTIMIZER_NAME).items():
        name, _, entry = key.rpartition("/")
        if name not in trainable:
            raise ModelError(f"{checkpoint / OPTIMIZER_NAME} has moments of {name}, which this LoRA does not have")
        parameter = trainable[name]
        # AdamW keeps its step count on the CPU in float32, the moments beside the parameter.
        optimizer.state[parameter][entry] = value if entry == "step" else value.to(parameter)
    return int(state["step"])


def _trainable(transformer: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
