"""Optimizers by name or class path, and the learning rate of each step."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dittocache.errors import ConfigError
from dittocache.training.config import TrainConfig

CLASS_PATHS = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "prodigy": "prodigyopt.Prodigy",
}
PACKAGES = {"bitsandbytes": "bitsandbytes", "prodigyopt": "prodigyopt"}  # module -> what to install


def make_optimizer(parameters: Sequence[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over `parameters`.

    Raises ConfigError where its package is not installed, the class does not exist or is no optimizer, or it does not
    take one of the arguments.
    """
    path = CLASS_PATHS.get(config.optimizer, config.optimizer)
    optimizer_class = _imported(path)
    options: dict[str, Any] = {"lr": config.learning_rate}
    options |= {name: value for name in ("weight_decay", "betas") if (value := getattr(config, name)) is not None}
    options |= config.optimizer_args
    try:
        optimizer: torch.optim.Optimizer = optimizer_class(parameters, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"train.optimizer {path} does not take {options}: {error}; "
            "mend train.optimizer_args, train.weight_decay or train.betas"
        ) from error
    return optimizer


def restore_arguments(optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
    """Put this run's own arguments back after a saved state, which holds those it was saved with, was loaded."""
    options = {name: value for name in ("weight_decay", "betas") if (value := getattr(config, name)) is not None}
    options |= config.optimizer_args
    for group in optimizer.param_groups:
        group.update({name: value for name, value in options.items() if name in group})


def learning_rate_schedule(config: TrainConfig) -> Callable[[int], float]:
    """A function from an optimizer step (from 0) to its learning rate: diffusers' schedules, by step alone.

    The warm-up starts above zero, so that no step is spent on nothing, and takes at most half of a short run.
    """
    from diffusers.optimization import get_scheduler

    # diffusers' schedules start at a rate of zero; ours is the same curve from its second step on.
    warmup = min(config.warmup_steps, config.steps // 2) + 1
    name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=config.learning_rate)
    scheduler = get_scheduler(
        name,
        stand_in,
        num_warmup_steps=warmup,
        num_training_steps=config.steps + 1,
        num_cycles=config.lr_cycles,
        power=config.lr_power,
    )
    [factor] = scheduler.lr_lambdas
    return lambda step: config.learning_rate * float(factor(step + 1))


def _imported(path: str) -> Any:
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = PACKAGES.get(module_name.partition(".")[0], module_name.partition(".")[0])
        raise ConfigError(
            f"train.optimizer needs {path}, and {module_name} cannot be imported ({error}); "
            f"`pip install {package}`, or choose adamw"
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"train.optimizer: {path} is no optimizer class; expected one like torch.optim.AdamW")
    return found
