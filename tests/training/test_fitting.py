"""Which way of holding the weights is chosen for which memory: arithmetic on made-up plans."""

from __future__ import annotations

import pytest

from dittocache.training.config import TrainConfig
from dittocache.training.fitting import CHOICES, fitting_choice
from dittocache.training.memory_plan import RESERVED, plan_of
from dittocache.training.transformer_facts import TransformerFacts

GB = 10**9
# Ten blocks of 4 GB, with activations that are far too many to keep: 90, 47, 31, 15 and 15 GB on the device.
FACTS = TransformerFacts(
    weights=40 * GB,
    weights_in_fp8=20 * GB,
    linear=40 * GB,
    element=2,
    blocks=10,
    lora=GB // 4,
    optimizer=GB // 2,
    kept=48 * GB,
    between=GB // 5,
    largest=GB // 4,
)
PLANS = [(choice, plan_of(FACTS, TrainConfig.model_validate(dict(choice)))) for choice in CHOICES]


def test_the_choices_are_ordered_by_speed_and_need_less_and_less() -> None:
    totals = [plan.device_total / GB for _, plan in PLANS]
    assert totals == pytest.approx([90.0, 47.0, 31.0, 15.0, 15.0])
    assert [plan.weights for _, plan in PLANS] == [40 * GB, 40 * GB, 20 * GB, 40 * GB, 20 * GB]


@pytest.mark.parametrize(
    ("device", "machine", "expected"),
    [
        (141, 100, 0),
        (92, 100, 0),
        (91, 100, 1),  # 90 and what is reserved
        (80, 100, 1),
        (48, 100, 2),
        (24, 100, 3),
        (24, 30, 4),  # the whole weights do not fit the machine, in 8 bit they do
    ],
)
def test_the_fastest_that_fits_is_chosen(device: int, machine: int, expected: int) -> None:
    fit = fitting_choice(device * GB, machine * GB, PLANS)
    assert fit.fits
    assert (fit.choice, fit.plan) == PLANS[expected]
    assert fit.plan.device_total + RESERVED <= device * GB
    assert f"{device}.0 GB are free on the GPU" in fit.reason


def test_the_reason_says_what_was_chosen() -> None:
    reasons = [fitting_choice(device * GB, 100 * GB, PLANS).reason for device in (141, 80, 48, 24)]
    assert reasons[0].endswith("nothing has to be saved")
    assert reasons[1].endswith("gradient checkpointing")
    assert reasons[2].endswith("gradient checkpointing, weights in fp8")
    assert reasons[3].endswith("gradient checkpointing, blocks brought from the machine's memory")


@pytest.mark.parametrize(("device", "machine"), [(12, 100), (24, 10)])
def test_where_nothing_fits_the_least_is_taken_and_told(device: int, machine: int) -> None:
    fit = fitting_choice(device * GB, machine * GB, PLANS)
    assert not fit.fits
    assert fit.plan.device_total == min(plan.device_total for _, plan in PLANS)
    assert "training needs at least about 16.5 GB of the GPU" in fit.reason
    assert "of the machine" in fit.reason and "a lower data.resolution takes less" in fit.reason


def test_every_choice_is_of_settings_that_may_stand_together() -> None:
    for choice in CHOICES:
        TrainConfig.model_validate(dict(choice))


def test_casts_of_fp8_are_kept_without_checkpointing() -> None:
    plain = plan_of(FACTS, TrainConfig(base_quantization="fp8"))
    assert plain.working - PLANS[0][1].working == FACTS.weights


def test_smaller_formats_and_an_average() -> None:
    nf4, int8, whole = (plan_of(FACTS, TrainConfig(base_quantization=kind)) for kind in ("nf4", "int8", "none"))
    assert (nf4.weights, int8.weights, whole.weights) == (11.25 * GB, 20 * GB, 40 * GB)
    assert plan_of(FACTS, TrainConfig(ema_decay=0.99)).average == FACTS.lora
