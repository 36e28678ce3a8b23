"""What happens at which step: pure functions, so properties."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from dittocache.errors import DataError
from dittocache.training.config import TrainConfig
from dittocache.training.schedule import (
    draw,
    draw_sigmas,
    global_batches,
    micro_batches,
    sample_seed,
    timestep_shift,
)

BUCKETS = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(0, 2), min_size=1, max_size=9)


def _first(buckets: dict[str, int], size: int, count: int, seed: int = 0) -> list[list[str]]:
    return list(islice(global_batches(buckets, size, seed), count))


@settings(deadline=None, max_examples=60)
@given(BUCKETS, st.integers(1, 4), st.integers(0, 5))
def test_all_samples_are_seen_equally_often_in_full_batches(buckets: dict[str, int], size: int, seed: int) -> None:
    epochs = 5
    batches = _first(buckets, size, epochs * len(buckets) // size, seed)
    assert all(len(batch) == size for batch in batches)
    counts = Counter(name for batch in batches for name in batch)
    assert all(epochs - 2 <= counts[name] <= epochs + 1 for name in buckets)


@settings(deadline=None, max_examples=60)
@given(BUCKETS, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_processes_and_accumulation_divide_one_and_the_same_batch(
    buckets: dict[str, int], batch_size: int, accumulation: int, world: int
) -> None:
    size = batch_size * accumulation * world
    for names in _first(buckets, size, 6):
        shares = [micro_batches(names, buckets, batch_size, rank, world) for rank in range(world)]
        parts = [part for share in shares for part in share]
        assert [place for part in parts for place in part.places] == list(range(size))
        assert [name for part in parts for name in part.names] == names
        assert all(sum(len(part.names) for part in share) == batch_size * accumulation for share in shares)
        assert all(len(part.names) <= batch_size and len({buckets[n] for n in part.names}) == 1 for part in parts)


def test_most_batches_are_of_one_bucket_and_pass_the_model_at_once() -> None:
    buckets = {str(index): index % 3 for index in range(31)}
    parts = [len(micro_batches(names, buckets, 4)) for names in _first(buckets, 4, 70)]
    assert parts.count(1) > 0.75 * len(parts)


def test_epochs_differ_in_order() -> None:
    buckets = {str(index): 0 for index in range(12)}
    batches = _first(buckets, 1, 24)
    assert batches[:12] != batches[12:]


def test_buckets_take_turns_within_an_epoch() -> None:
    buckets = {str(index): index // 20 for index in range(40)}
    order = [buckets[name] for [name] in _first(buckets, 1, 40)]
    assert 5 < sum(order[:20]) < 15


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        next(global_batches({}, 1, 0))


@pytest.mark.parametrize(
    ("sampling", "shift", "median"),
    [
        ("uniform", 1.0, 0.5),
        ("logit_normal", 1.0, 0.5),
        ("shifted", 3.0, 0.75),
        ("resolution_shifted", 1.0, math.exp(1.15) / (1 + math.exp(1.15))),  # FLUX at 4096 tokens: mu = 1.15
    ],
)
def test_sigmas_have_the_configured_distribution(sampling: str, shift: float, median: float) -> None:
    config = TrainConfig(timestep_sampling=sampling, timestep_shift=shift)  # type: ignore[arg-type]
    sigmas = draw_sigmas(config, 20_000, 4096, torch.Generator().manual_seed(0))
    assert sigmas.shape == (20_000,)
    assert 0 <= float(sigmas.min()) < float(sigmas.max()) <= 1
    assert float(sigmas.median()) == pytest.approx(median, abs=0.02)
    spread = {"uniform": 0.289, "logit_normal": 0.208, "shifted": 0.249, "resolution_shifted": 0.17}[sampling]
    assert float(sigmas.std()) == pytest.approx(spread, abs=0.02)


def test_the_shift_grows_with_the_picture_as_in_the_pipeline() -> None:
    config = TrainConfig(timestep_sampling="resolution_shifted", shift_tokens=(256, 8192), shift_exponents=(0.5, 0.9))
    assert timestep_shift(config, 256) == pytest.approx(math.exp(0.5))
    assert timestep_shift(config, 8192) == pytest.approx(math.exp(0.9))
    assert timestep_shift(config, 4096) == pytest.approx(math.exp(calculate_shift(4096, 256, 8192, 0.5, 0.9)))


def test_the_width_of_the_logit_normal_is_a_setting() -> None:
    config = TrainConfig(logit_mean=1.0, logit_std=0.1)
    sigmas = draw_sigmas(config, 5_000, 16, torch.Generator().manual_seed(0))
    assert float(sigmas.logit().mean()) == pytest.approx(1.0, abs=0.01)
    assert float(sigmas.logit().std()) == pytest.approx(0.1, abs=0.01)


def test_steps_and_places_draw_different_numbers() -> None:
    seeds = {sample_seed(seed, step, place) for seed in range(3) for step in range(3) for place in range(-1, 3)}
    assert len(seeds) == 36


def test_dropping_captions_does_not_change_the_noise() -> None:
    config = TrainConfig(seed=3)
    never, always = (draw(config, 5, 1, (4, 2), dropout) for dropout in (0.0, 1.0))
    assert (never.drop_caption, always.drop_caption) == (False, True)
    assert torch.equal(never.noise, always.noise)
    assert torch.equal(never.sigma, always.sigma)
    drops = [draw(config, step, 0, (1, 1), 0.3).drop_caption for step in range(500)]
    assert 0.25 < sum(drops) / 500 < 0.35
