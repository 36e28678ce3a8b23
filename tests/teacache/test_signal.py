"""The distance between the inputs of two steps."""

from __future__ import annotations

import math

import pytest
import torch
from tests.denoising import DeviceReads

from dittocache.teacache.signal import relative_l1


def test_it_is_the_mean_change_over_the_mean_of_the_step_before() -> None:
    previous = torch.tensor([[[1.0, -1.0], [2.0, -4.0]]])
    current = torch.tensor([[[1.5, -1.0], [2.0, -3.0]]])
    assert relative_l1(current, previous) == [pytest.approx((0.5 + 1.0) / 8)]
    assert relative_l1(previous, current) == [pytest.approx((0.5 + 1.0) / 7.5)]  # the denominator is the step before


def test_16_bit_tensors_are_compared_in_32_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    previous = torch.randn(1, 64, 32, generator=generator).bfloat16()
    current = (previous.float() + 0.3 * torch.randn(1, 64, 32, generator=generator)).bfloat16()
    exact = (current.double() - previous.double()).abs().mean() / previous.double().abs().mean()
    assert relative_l1(current, previous) == [pytest.approx(float(exact), rel=1e-5)]


def test_half_precision_sums_do_not_overflow() -> None:
    previous = torch.full((1, 512, 512), 60000.0, dtype=torch.float16)
    assert relative_l1(-previous, previous) == [pytest.approx(2.0)]


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf])
def test_where_nothing_can_be_compared_the_distance_is_not_finite(broken: float) -> None:
    previous = torch.full((1, 4, 4), broken)
    assert not math.isfinite(relative_l1(torch.ones(1, 4, 4), previous)[0])
    assert not math.isfinite(relative_l1(torch.ones(1, 4, 4), torch.ones(1, 5, 4))[0])


def test_each_row_of_a_batch_has_a_distance_of_its_own() -> None:
    previous, current = torch.ones(3, 4, 4), torch.ones(3, 4, 4)
    current[1] *= 2
    current[2, 0] = math.nan
    assert relative_l1(current, previous)[:2] == [0.0, 1.0]
    assert math.isnan(relative_l1(current, previous)[2])


def test_one_read_from_the_device() -> None:
    with DeviceReads() as reads:
        relative_l1(torch.ones(1, 4, 4), torch.ones(1, 4, 4))
    assert reads.count == 1
