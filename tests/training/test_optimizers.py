"""Optimizers by name and class path; learning rates by step alone."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from pydantic import ValidationError

from dittocache.errors import ConfigError
from dittocache.training.config import TrainConfig
from dittocache.training.optimizers import learning_rate_schedule, make_optimizer, restore_arguments


def _parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_adamw_is_the_default_with_the_configured_arguments() -> None:
    config = TrainConfig(learning_rate=0.5, weight_decay=0.3, betas=(0.8, 0.9), optimizer_args={"eps": 1e-5})
    optimizer = make_optimizer(_parameters(), config)
    assert type(optimizer) is torch.optim.AdamW
    [group] = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.5, 0.3, (0.8, 0.9), 1e-5)


def test_any_class_path() -> None:
    config = TrainConfig(optimizer="torch.optim.SGD", optimizer_args={"momentum": 0.9})
    optimizer = make_optimizer(_parameters(), config)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "torch.optim.AdamWW"}, "no optimizer class"),
        ({"optimizer": "torch.nn.Linear"}, "no optimizer class"),
        ({"optimizer": "nowhere.Optimizer"}, "pip install nowhere"),
        ({"optimizer_args": {"momentum": 1}}, "mend train.optimizer_args"),
        ({"optimizer": "torch.optim.SGD", "betas": (0.9, 0.99)}, "train.betas"),
    ],
)
def test_what_cannot_be_made_says_why(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_optimizer(_parameters(), TrainConfig.model_validate(settings))


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_optimizers_of_other_packages_are_made_or_name_the_package(name: str, package: str) -> None:
    config = TrainConfig(optimizer=name)
    if importlib.util.find_spec(package) is None:
        with pytest.raises(ConfigError, match=f"pip install {package}"):
            make_optimizer(_parameters(), config)
    else:
        assert type(make_optimizer(_parameters(), config)).__module__.startswith(package)


@pytest.mark.parametrize("name", ["adam w", "AdamW", "adamw9", ""])
def test_a_name_that_is_neither_is_refused_at_the_door(name: str) -> None:
    with pytest.raises(ValidationError):
        TrainConfig(optimizer=name)


def test_arguments_given_anew_win_over_saved_ones_and_the_rest_stays() -> None:
    optimizer = make_optimizer(_parameters(), TrainConfig(weight_decay=0.1, betas=(0.5, 0.6)))
    restore_arguments(optimizer, TrainConfig(weight_decay=0.2))
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 0.01), ("cosine", 0.5, 0.0), ("polynomial", 0.25, 0.0)],
)
def test_schedules_go_down_as_named(schedule: str, middle: float, last: float) -> None:
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, lr_schedule=schedule, lr_power=2.0)  # type: ignore[arg-type]
    rate = learning_rate_schedule(config)
    assert rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(middle, abs=1e-6)
    assert rate(109) == pytest.approx(last, abs=1e-3)


def test_restarts_come_back_to_the_peak() -> None:
    config = TrainConfig(steps=100, warmup_steps=0, learning_rate=1.0, lr_schedule="cosine_with_restarts", lr_cycles=2)
    rate = learning_rate_schedule(config)
    assert rate(49) < 0.01
    assert rate(50) == pytest.approx(1.0)


def test_the_learning_rate_warms_up_and_goes_down_to_zero() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rate = learning_rate_schedule(config)
    rates = [rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)  # no step is spent on nothing
    assert rates[10] == max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_run_shorter_than_the_warm_up_still_learns(steps: int) -> None:
    config = TrainConfig(steps=steps, warmup_steps=10, learning_rate=1.0)
    rate = learning_rate_schedule(config)
    rates = [rate(step) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) >= 0.5
