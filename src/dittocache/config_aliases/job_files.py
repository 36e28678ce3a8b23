"""Job files of the automatic pre-caching workflow: a flat list of settings, with the checkpoint in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dittocache.config_aliases.nested import put, taken

COMPONENTS = {"dit": "transformer", "vae": "vae", "text_encoder": "text_encoder"}
"""Setting of a job file, and the folder of a diffusers checkpoint that holds the same."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def apply_job_file(settings: dict[str, Any], problems: list[str]) -> None:
    """Take what only job files have out of `settings`, and set what it stands for."""
    for name, component in COMPONENTS.items():
        value = taken(settings, name, None)
        if value is None:
            continue
        checkpoint = checkpoint_of(value, component) if isinstance(value, str) else None
        if checkpoint is None:
            problems.append(
                f"{name}: found {value!r}; expected the folder {component} of a diffusers checkpoint, or a file in it. "
                "Single files cannot be used: write model.path with the checkpoint's folder, or its id on the hub, "
                "such as Qwen/Qwen-Image-Edit-2511, and leave dit, vae and text_encoder out"
            )
        else:
            put(settings, "model.path", checkpoint, name, problems)
    for name, ours in (("lr_scheduler", "train.lr_schedule"), ("optimizer", "train.optimizer")):
        if isinstance(settings.get(name), str):  # in other configs these are sections
            put(settings, ours, settings.pop(name), name, problems)
    if taken(settings, "fp8_base", False) is True:
        put(settings, "train.base_quantization", "fp8", "fp8_base", problems)
    taken(settings, "fp8_vl", None)  # of training: no encoder is in memory then


def checkpoint_of(path: str, component: str) -> str | None:
    """The diffusers checkpoint that this folder of a component, file in it, or whole checkpoint belongs to."""
    place = Path(path).expanduser()
    if place.suffix in _WEIGHTS:
        place = place.parent
    if (place / component).is_dir() and (place / "model_index.json").is_file():
        return str(place)
    return str(place.parent) if place.name == component and (place.parent / "model_index.json").is_file() else None
