"""What is read between refreshes, exactly where K and V lie on a line in sigma; and the drift meter."""

from __future__ import annotations

import pytest
import torch

from dittocache.referencekv.policy import RefreshRule
from dittocache.referencekv.prediction import BranchReferences
from dittocache.referencekv.store import BranchKV

BLOCKS = 4
START, SLOPE = (torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def on_the_line(sigma: float) -> torch.Tensor:
    return START + SLOPE * sigma


def refresh(kept: BranchReferences, step: int, sigma: float, value: torch.Tensor | None = None) -> None:
    kept.begin_filling(step, sigma)
    for block in range(BLOCKS):
        key = on_the_line(sigma) if value is None else value
        kept.put(block, key, 2 * key)
    kept.filled()


def branch(extrapolate: bool = True) -> BranchReferences:
    rule = RefreshRule(tolerance=0.1, extrapolate=extrapolate)
    return BranchReferences(rule, BranchKV(), BranchKV() if extrapolate else None, range(BLOCKS))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_on_a_line_it_is_exact_up_to_its_reach(block: int) -> None:
    kept = branch()
    refresh(kept, 0, 1.0)
    kept.aim(0.9)
    assert torch.equal(kept.take(block)[0], on_the_line(1.0))  # one refresh is no line
    refresh(kept, 2, 0.75)
    for sigma, reached in ((0.75, 0.75), (0.6, 0.6), (0.5, 0.5), (0.1, 0.5)):
        kept.aim(sigma)
        key, value = kept.take(block)
        assert torch.allclose(key, on_the_line(reached), atol=1e-6)
        assert torch.allclose(value, 2 * on_the_line(reached), atol=1e-6)
    refresh(kept, 4, 0.5)
    kept.aim(0.25)
    assert torch.allclose(kept.take(block)[0], on_the_line(0.25), atol=1e-6)


def test_without_extrapolation_it_is_the_last_refresh() -> None:
    kept = branch(extrapolate=False)
    for step, sigma in enumerate((1.0, 0.75)):
        refresh(kept, step, sigma)
        kept.aim(sigma - 0.2)
        assert torch.equal(kept.take(0)[0], on_the_line(sigma))


def test_the_meter_measures_how_far_the_keys_are_from_what_was_predicted() -> None:
    kept = branch()
    refresh(kept, 0, 1.0)
    assert kept.drift is None
    refresh(kept, 1, 0.75)
    assert kept.drift is not None
    moved = (on_the_line(1.0) - on_the_line(0.75)).norm() / on_the_line(0.75).norm()
    assert float(kept.drift) == pytest.approx(float(moved), rel=1e-5)
    refresh(kept, 2, 0.5)
    assert float(kept.drift) < 1e-6  # it lies on the line
    refresh(kept, 3, 0.25, 3 * on_the_line(0.25))
    assert float(kept.drift) == pytest.approx(2 / 3, rel=1e-5)
    since = kept.since(0.125)
    assert since is not None
    assert (since.step, since.measured_over, since.distance) == (3, 0.25, 0.125)


def test_two_generations_are_kept_and_no_more() -> None:
    newest, older = BranchKV(), BranchKV()
    kept = BranchReferences(RefreshRule(every=2, extrapolate=True), newest, older, range(BLOCKS))
    for step in range(5):
        refresh(kept, step, 1 - step / 8)
    assert newest.bytes_held == older.bytes_held == BLOCKS * 2 * START.numel() * 4
