"""Checkpoints of a LoRA run: a folder a step, complete or absent.

    checkpoints/step-00000500/
        pytorch_lora_weights.safetensors       the LoRA to use: loads with `pipe.load_lora_weights(folder)`
        raw/pytorch_lora_weights.safetensors   where that is a moving average: the weights that training goes on from
        training_state.safetensors             tensors of the optimizer and of the moving average
        state.json                             step, settings, and all numbers of the training state

A checkpoint is written to a temporary folder, flushed, and renamed. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittocache.errors import ConfigError, ModelError, StageError
from dittocache.families.base import Family
from dittocache.training.lora import WEIGHT_NAME, restore_lora, save_lora

TENSORS_NAME = "training_state.safetensors"
STATE_NAME = "state.json"
RAW_NAME = "raw"
PREFIX = "step-"
DAMAGED_PREFIX = "damaged-"  # before the name of one that cannot be read: it counts for nothing, and is left to look at
TENSOR_MARK = "__tensor__"  # in state.json: the name of a tensor that stood here


@dataclass(frozen=True)
class Trained:
    """Everything of a run that changes from step to step.

    Attributes:
        transformer: the bare model with its LoRA.
        family: of the transformer.
        optimizer: the bare optimizer over the LoRA's parameters.
        average: diffusers' `EMAModel` over them, or None.
        scaler: the gradient scaler of fp16 training, or None.
    """

    transformer: Any
    family: Family
    optimizer: torch.optim.Optimizer
    average: Any = None
    scaler: Any = None

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The LoRA's parameters by name, in the optimizer's order."""
        return {name: one for name, one in self.transformer.named_parameters() if one.requires_grad}


@contextmanager
def averaged(trained: Trained) -> Iterator[None]:
    """The transformer with the weights to use: the moving average where there is one; the raw ones come back after."""
    if trained.average is None:
        yield
        return
    parameters = list(trained.parameters.values())
    trained.average.store(parameters)
    trained.average.copy_to(parameters)
    try:
        yield
    finally:
        trained.average.restore(parameters)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / STATE_NAME).is_file())


def set_aside_damaged(folder: Path) -> list[str]:
    """Rename checkpoints that cannot be read, so that the run goes on from the newest one that can; say which, why."""
    told = []
    for checkpoint in checkpoints(folder):
        reason = _damage(checkpoint)
        if reason is not None:
            aside = checkpoint.with_name(f"{DAMAGED_PREFIX}{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            told.append(f"checkpoint {checkpoint.name} cannot be read ({reason}); it is now {aside}")
    return told


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps that were taken when it was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def save_checkpoint(
    folder: Path, step: int, trained: Trained, settings: Mapping[str, Any], keep: int | None = None
) -> Path:
    """Write the state after `step` optimizer steps, remove all but the newest `keep`; return the checkpoint's folder.

    A checkpoint of this step that is there already is replaced. Raises ConfigError where the optimizer keeps a state
    that cannot be saved, StageError where the files cannot be written: the checkpoints before stay as they are.
    """
    from safetensors import SafetensorError

    final = folder / f"{PREFIX}{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        for left in folder.glob(f".{PREFIX}*"):  # by a process that was killed in the middle
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary, step, trained, settings)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        earlier = checkpoints(folder)
        newest = f"the newest one there is {earlier[-1].name}" if earlier else "there is none yet"
        raise StageError(
            f"the checkpoint of step {step} cannot be written to {folder}: {error}; {newest}. Make room or mend the "
            "folder, then run the same command: it goes on from there"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep is not None:
        for old in checkpoints(folder)[:-keep]:
            _remove(old)
    return final


def _write(folder: Path, step: int, trained: Trained, settings: Mapping[str, Any]) -> None:
    """All files of a checkpoint, flushed."""
    from safetensors.torch import save_file

    metadata = {**settings, "step": step}
    tensors: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {"step": step, "settings": dict(settings), "parameters": list(trained.parameters)}
    if trained.average is not None:
        save_lora(trained.transformer, trained.family, folder / RAW_NAME, metadata)
        average = trained.average.state_dict()
        state["average"] = _without_tensors(average, "average", tensors)
    with averaged(trained):
        save_lora(trained.transformer, trained.family, folder, metadata)
    state["optimizer"] = _without_tensors(trained.optimizer.state_dict(), "optimizer", tensors)
    if trained.scaler is not None:
        state["scaler"] = trained.scaler.state_dict()
    save_file(tensors, folder / TENSORS_NAME)
    (folder / STATE_NAME).write_text(json.dumps(state, indent=2, sort_keys=True))
    for name in (TENSORS_NAME, STATE_NAME):
        _flush(folder / name)


def load_checkpoint(checkpoint: Path, trained: Trained) -> int:
    """Put weights, optimizer, average and scaler back and return the number of steps taken.

    Raises ModelError where the checkpoint does not fit the LoRA.
    """
    from safetensors.torch import load_file

    state = json.loads((checkpoint / STATE_NAME).read_text())
    names = list(trained.parameters)
    if state["parameters"] != names:
        other = sorted(set(state["parameters"]) ^ set(names))
        raise ModelError(f"the LoRA in {checkpoint} does not fit this transformer: they differ in {other[:3]}")
    tensors = load_file(checkpoint / TENSORS_NAME)
    raw = checkpoint / RAW_NAME
    restore_lora(trained.transformer, trained.family, raw if raw.is_dir() else checkpoint)
    optimizer = _with_tensors(state["optimizer"], tensors)
    optimizer["state"] = {int(index): value for index, value in optimizer["state"].items()}
    trained.optimizer.load_state_dict(optimizer)
    if trained.average is not None:
        trained.average.load_state_dict(_with_tensors(state["average"], tensors))
        trained.average.to(device=next(iter(trained.parameters.values())).device)
    if trained.scaler is not None:
        trained.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def saved_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that wrote it."""
    settings: dict[str, Any] = json.loads((checkpoint / STATE_NAME).read_text())["settings"]
    return settings


def _without_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON values, its tensors taken out to `tensors`."""
    if isinstance(value, torch.Tensor):
        # Clones: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TENSOR_MARK: name}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(inner, f"{name}/{key}", tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(inner, f"{name}/{index}", tensors) for index, inner in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"the optimizer keeps a {type(value).__name__} in {name}, which a checkpoint cannot hold; "
        "choose another train.optimizer"
    )


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `_without_tensors` took apart."""
    if isinstance(value, dict):
        if TENSOR_MARK in value:
            return tensors[value[TENSOR_MARK]]
        return {key: _with_tensors(inner, tensors) for key, inner in value.items()}
    return [_with_tensors(inner, tensors) for inner in value] if isinstance(value, list) else value


def _damage(checkpoint: Path) -> str | None:
    """Why it cannot be loaded; None where its files are whole, by their headers and lengths."""
    from safetensors import SafetensorError, safe_open

    raw = [checkpoint / RAW_NAME / WEIGHT_NAME] if (checkpoint / RAW_NAME).exists() else []
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text())
        if not isinstance(state, dict) or not {"step", "settings", "parameters", "optimizer"} <= state.keys():
            return f"{STATE_NAME} is not a training's state"
        for file in (checkpoint / WEIGHT_NAME, checkpoint / TENSORS_NAME, *raw):
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    return None


def _remove(checkpoint: Path) -> None:
    # Without its state a checkpoint does not count, so that one that is half removed is never resumed from.
    (checkpoint / STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
