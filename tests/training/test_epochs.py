"""Epochs and repeats: how often each sample is seen, how many steps that makes, and the same again when resumed."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.training.conftest import MemoryReader

from dittocache.demo.tiny import tiny_pipeline
from dittocache.families.base import Family
from dittocache.training.config import TrainConfig
from dittocache.training.continuation import check_continuation, run_settings
from dittocache.training.loop import TrainState, train_lora
from dittocache.training.lora import add_lora
from dittocache.training.schedule import epoch_length, global_batches, with_steps
from dittocache.training.sources import CachedSource

SETTINGS: dict[str, Any] = {"batch_size": 2, "rank": 2, "learning_rate": 5e-3, "warmup_steps": 2}
REPEATS = {"s1": 3, "s2": 2}  # an epoch of 1 + 3 + 2 + 1 = 7


def _run(
    family: Family, reader: MemoryReader, config: TrainConfig, repeats: dict[str, int], **options: Any
) -> list[TrainState]:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    add_lora(transformer, family, config)
    source = CachedSource(reader)
    return list(train_lora(transformer, family, source, reader.names, config, repeats=repeats, **options))


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=3),
        st.tuples(st.integers(0, 2), st.integers(1, 4)),
        min_size=1,
        max_size=7,
    ),
    st.integers(1, 4),
)
def test_a_sample_comes_as_often_as_it_is_repeated(samples: dict[str, tuple[int, int]], size: int) -> None:
    buckets = {name: bucket for name, (bucket, _) in samples.items()}
    repeats = {name: count for name, (_, count) in samples.items() if count > 1}
    length = epoch_length(list(buckets), repeats)
    assert length == sum(count for _, count in samples.values())
    epochs = size  # so many epochs end with a whole batch
    batches = islice(global_batches(buckets, size, 0, repeats), epochs * length // size)
    seen = Counter(name for batch in batches for name in batch)
    assert seen == {name: epochs * count for name, (_, count) in samples.items()}


@pytest.mark.parametrize(
    ("epochs", "length", "settings", "processes", "steps"),
    [
        (1, 20, {}, 1, 20),
        (3, 20, {"batch_size": 4}, 1, 15),
        (3, 7, {"batch_size": 2}, 1, 11),  # 10.5 batches: the last one begins a fourth epoch
        (2, 20, {"batch_size": 2, "gradient_accumulation_steps": 2}, 2, 5),
        (1, 3, {"batch_size": 8}, 1, 1),
    ],
)
def test_epochs_are_steps_once_the_samples_are_known(
    epochs: int, length: int, settings: dict[str, Any], processes: int, steps: int
) -> None:
    config = with_steps(TrainConfig(epochs=epochs, **settings), length, processes)
    assert (config.steps, config.epochs) == (steps, None)


def test_steps_stay_as_they_are() -> None:
    assert with_steps(TrainConfig(steps=7), 3, 1).steps == 7


@pytest.mark.parametrize("given", [{"epochs": 2}, {"epochs": 2, "steps": None}, {"steps": 9}, {}])
def test_either_is_saved_and_read_again(given: dict[str, Any]) -> None:
    config = TrainConfig.model_validate(given)
    again = TrainConfig.model_validate(config.model_dump(mode="json"))
    assert (again.epochs, again.steps) == (config.epochs, config.steps)
    assert (config.epochs, config.steps) == (given.get("epochs"), given.get("steps") or 1000)


def test_both_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"train\.steps or train\.epochs, not both"):
        TrainConfig(steps=5, epochs=1)


def test_epochs_with_repeats_resumed_are_the_uninterrupted_run(
    family: Family, reader: MemoryReader, tmp_path: Path
) -> None:
    config = TrainConfig(**SETTINGS, epochs=2)  # 14 samples, 7 steps
    whole = _run(family, reader, config, REPEATS)
    assert len(whole) == 7
    assert whole[-1].epoch == 2.0
    assert Counter(name for state in whole for name in state.names) == {"s0": 2, "s1": 6, "s2": 4, "s3": 2}

    asked = iter([False] * 2 + [True])
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "resume": True}
    first = _run(family, reader, config, REPEATS, should_stop=lambda: next(asked), **options)
    notices: list[str] = []
    rest = _run(family, reader, config, REPEATS, notice=notices.append, **options)
    assert (len(first), len(rest)) == (3, 4)
    assert [(one.loss, one.learning_rate) for one in first + rest] == [(one.loss, one.learning_rate) for one in whole]
    assert notices == []


def test_other_repeats_are_another_run(family: Family, reader: MemoryReader) -> None:
    config = TrainConfig(**SETTINGS, steps=4)
    saved, current = (run_settings(config, family, reader.names, 0.0, 1, {}, repeats) for repeats in (REPEATS, {}))
    [difference] = check_continuation(saved, current, Path("step-00000001"))
    assert difference.startswith("data: the samples, their files, captions or repeats are not those")
    losses = [[one.loss for one in _run(family, reader, config, repeats)] for repeats in (REPEATS, {})]
    assert losses[0] != losses[1]
