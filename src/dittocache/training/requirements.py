"""What the settings of a training need of this machine, asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dittocache.data.sample import Sample
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
        checks.append(lambda: quantization_config(config, torch.bfloat16, device))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems or [str(error)]
    return problems


def visibility_problems(config: TrainConfig, family_name: str, samples: Sequence[Sample]) -> list[str]:
    """Why `config.reference_visibility` does not fit these samples: isolated references need references."""
    without = [sample.name for sample in samples if not sample.controls]
    if config.reference_visibility == "full" or not without:
        return []
    return [
        f"train.reference_visibility: found isolated, but {len(without)} sample(s) of family {family_name} have no "
        f"control picture, the first {without[0]}: there are no references to isolate; expected full, or a family and "
        "samples that edit pictures"
    ]
