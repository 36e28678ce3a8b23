"""What the settings of a training need of this machine, asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dittocache.errors import ConfigError
from dittocache.training.accelerator import require_loggers, require_precision
from dittocache.training.config import TrainConfig
from dittocache.training.frozen_base import quantization_config
from dittocache.training.optimizers import make_optimizer


def requirement_problems(config: TrainConfig, device: str) -> list[str]:
    """Why this training could not run here, a line each: packages that are missing, arguments that do not fit."""
    problems: list[str] = []
    checks: list[Callable[[], object]] = [
        lambda: make_optimizer([torch.nn.Parameter(torch.zeros(1))], config),
        lambda: require_precision(config, device),
        lambda: require_loggers(config.log_with),
    ]
    if config.base_quantization in ("nf4", "int8"):
        checks.append(lambda: quantization_config(config, torch.bfloat16))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems or [str(error)]
    return problems
