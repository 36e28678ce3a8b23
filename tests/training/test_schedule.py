"""What happens at which step: pure functions, so properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dittocache.errors import DataError
from dittocache.training.config import TrainConfig
from dittocache.training.schedule import batches_from, draw_sigmas, learning_rate_at, step_generator

BUCKETS = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(0, 2), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(BUCKETS, st.integers(1, 4), st.integers(0, 5), st.integers(0, 20), st.integers(0, 20))
def test_resuming_continues_the_same_batches(
    buckets: dict[str, int], batch_size: int, seed: int, start: int, count: int
) -> None:
    whole = list(batches_from(buckets, batch_size, seed, 0, start + count))
    assert list(batches_from(buckets, batch_size, seed, start, count)) == whole[start:]


@settings(deadline=None, max_examples=60)
@given(BUCKETS, st.integers(1, 4), st.integers(0, 5))
def test_an_epoch_visits_every_sample_once_in_batches_of_one_bucket(
    buckets: dict[str, int], batch_size: int, seed: int
) -> None:
    sizes = [list(buckets.values()).count(bucket) for bucket in set(buckets.values())]
    batches = list(batches_from(buckets, batch_size, seed, 0, sum(math.ceil(size / batch_size) for size in sizes)))
    assert sorted(name for batch in batches for name in batch) == sorted(buckets)
    assert all(len(batch) <= batch_size and len({buckets[name] for name in batch}) == 1 for batch in batches)


@settings(deadline=None, max_examples=60)
@given(BUCKETS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_processes_share_the_batches_of_one(buckets: dict[str, int], batch_size: int, world: int, steps: int) -> None:
    alone = list(batches_from(buckets, batch_size, 0, 0, steps * world))
    shares = [list(batches_from(buckets, batch_size, 0, 0, steps, rank, world)) for rank in range(world)]
    assert [batch for step in zip(*shares, strict=True) for batch in step] == alone


def test_epochs_differ_in_order() -> None:
    buckets = {str(index): 0 for index in range(12)}
    batches = list(batches_from(buckets, 1, 0, 0, 24))
    assert batches[:12] != batches[12:]


def test_buckets_take_turns_within_an_epoch() -> None:
    buckets = {str(index): index // 20 for index in range(40)}
    order = [buckets[name] for [name] in batches_from(buckets, 1, 0, 0, 40)]
    assert 5 < sum(order[:20]) < 15


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        list(batches_from({}, 1, 0, 0, 1))


def test_the_learning_rate_warms_up_and_goes_down_to_zero() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)  # no step is spent on nothing
    assert rates[10] == max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_run_shorter_than_the_warm_up_still_learns(steps: int) -> None:
    config = TrainConfig(steps=steps, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) >= 0.5


@pytest.mark.parametrize(
    ("sampling", "shift", "median"), [("uniform", 1.0, 0.5), ("logit_normal", 1.0, 0.5), ("shifted", 3.0, 0.75)]
)
def test_sigmas_have_the_configured_distribution(sampling: str, shift: float, median: float) -> None:
    config = TrainConfig(timestep_sampling=sampling, timestep_shift=shift)  # type: ignore[arg-type]
    sigmas = draw_sigmas(config, 20_000, step_generator(0, 0, 0))
    assert sigmas.shape == (20_000,)
    assert 0 <= float(sigmas.min()) < float(sigmas.max()) <= 1
    assert float(sigmas.median()) == pytest.approx(median, abs=0.02)
    spread = float(sigmas.std())
    assert spread == pytest.approx({"uniform": 0.289, "logit_normal": 0.208, "shifted": 0.249}[sampling], abs=0.02)


def test_steps_and_processes_draw_different_numbers() -> None:
    draws = {
        tuple(torch.rand(3, generator=step_generator(seed, step, rank)).tolist())
        for seed in range(3)
        for step in range(3)
        for rank in range(3)
    }
    assert len(draws) == 27
