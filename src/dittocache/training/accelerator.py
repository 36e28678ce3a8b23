"""The `accelerate.Accelerator` of a run: device, processes, mixed precision, loggers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dittocache.errors import ConfigError
from dittocache.training.config import TrainConfig

LOGGER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
WAIT = timedelta(hours=2)  # as long may one process make validation pictures while the others wait


def make_accelerator(
    config: TrainConfig | None = None, device: str | None = None, logging_dir: Path | None = None
) -> Any:
    """An Accelerator fit for LoRA on these models, single process or DDP (`accelerate launch`).

    Args:
        config: mixed precision and loggers.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; by default, and in a DDP run, accelerate chooses.
        logging_dir: where `tensorboard` and `wandb` write.

    Raises ConfigError where a logger is not installed, or fp16 is asked for without a GPU.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    config = config if config is not None else TrainConfig()
    require_loggers(config.log_with)
    if device is not None and device.startswith("cuda:"):
        torch.cuda.set_device(device)  # accelerate takes the current one
    require_precision(config, device)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=config.mixed_precision,
        log_with=list(config.log_with) or None,
        project_dir=logging_dir,
        # The last block's text stream may not reach the output: its LoRA has no gradient, and DDP must know.
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=WAIT),
        ],
    )


def require_precision(config: TrainConfig, device: str | None) -> None:
    """Raise ConfigError where fp16 is asked for on a CPU: accelerate would silently train in full precision."""
    on_cpu = device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if config.mixed_precision == "fp16" and on_cpu:
        raise ConfigError("train.mixed_precision: fp16 needs a GPU, this run is on the CPU; set it to bf16 or no")


def require_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError that names every logger whose package is not installed."""
    problems = [
        f"train.log_with: {name} is not installed; `pip install {name}`, or leave it out"
        for name in names
        if not any(importlib.util.find_spec(package) for package in LOGGER_PACKAGES[name])
    ]
    if problems:
        raise ConfigError(f"{len(problems)} logger(s) are missing", problems)
