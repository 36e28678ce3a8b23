"""The loop: deterministic, resumable without a trace, and the same whether its input is cached or live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import ConfigError, ModelError, StageError
from dittocache.families.base import Family, Tensors
from dittocache.training.checkpoint import checkpoints
from dittocache.training.config import TrainConfig
from dittocache.training.loop import TrainState, train_lora
from dittocache.training.lora import add_lora, read_settings, save_lora
from dittocache.training.sources import CachedSource, LiveSource

CONFIG = TrainConfig(steps=8, batch_size=2, rank=4, alpha=8, learning_rate=5e-3, warmup_steps=2, checkpoint_every=3)


def _train(
    family: Family, source: Any, names: list[str], config: TrainConfig = CONFIG, **options: Any
) -> tuple[list[TrainState], Any]:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    add_lora(transformer, family, config)
    return list(train_lora(transformer, family, source, names, config, **options)), transformer


def _losses(states: list[TrainState]) -> list[float]:
    return [state.loss for state in states]


def _lora(transformer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in transformer.named_parameters() if "lora_" in name}


def test_the_same_run_twice_is_the_same_bit_for_bit(family: Family, reader: Any, names: list[str]) -> None:
    torch.manual_seed(1)
    first, one = _train(family, CachedSource(reader), names)
    torch.manual_seed(2)  # whatever the caller draws must not matter
    second, two = _train(family, CachedSource(reader), names)
    assert _losses(first) == _losses(second)
    assert all(torch.equal(value, _lora(two)[name]) for name, value in _lora(one).items())
    assert [state.step for state in first] == list(range(1, 9))


def test_another_seed_is_another_run(family: Family, reader: Any, names: list[str]) -> None:
    first, _ = _train(family, CachedSource(reader), names)
    second, _ = _train(family, CachedSource(reader), names, CONFIG.model_copy(update={"seed": 1}))
    assert _losses(first) != _losses(second)


def test_cached_input_trains_as_live_input_bit_for_bit(
    family: Family, live: LiveSource, reader: Any, names: list[str]
) -> None:
    cached, one = _train(family, CachedSource(reader), names, caption_dropout=0.5)
    encoded, two = _train(family, live, names, caption_dropout=0.5)
    assert _losses(cached) == _losses(encoded)
    assert all(torch.equal(value, _lora(two)[name]) for name, value in _lora(one).items())
    assert all(0 <= state.load_seconds < state.step_seconds <= state.seconds for state in encoded)


def test_training_learns_one_sample(family: Family, reader: Any) -> None:
    config = CONFIG.model_copy(update={"steps": 60, "batch_size": 1, "learning_rate": 3e-2, "rank": 16})
    states, _ = _train(family, CachedSource(reader), ["s0"], config)
    losses = _losses(states)
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])


@pytest.mark.parametrize("kept", [1, 3])
def test_a_batch_may_be_larger_than_the_data_set(family: Family, reader: Any, names: list[str], kept: int) -> None:
    few = names[:kept]
    states, _ = _train(family, CachedSource(reader), few, CONFIG.model_copy(update={"steps": 3, "batch_size": 4}))
    seen = [name for state in states for name in state.names]
    assert {len(state.names) for state in states} == {4}
    assert {seen.count(name) for name in few} == {12 // kept}


def test_only_the_lora_moves(family: Family, reader: Any, names: list[str]) -> None:
    before = dict(tiny_pipeline("qwen-image-edit-plus").transformer.named_parameters())
    _, transformer = _train(family, CachedSource(reader), names)
    for name, parameter in transformer.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    family: Family, reader: Any, names: list[str], tmp_path: Path
) -> None:
    whole, one = _train(family, CachedSource(reader), names, caption_dropout=0.3)
    asked = iter([False] * 3 + [True])
    options = {"caption_dropout": 0.3, "checkpoint_dir": tmp_path / "run", "resume": True}
    first, _ = _train(family, CachedSource(reader), names, should_stop=lambda: next(asked), **options)
    assert [state.stopped for state in first] == [False, False, False, True]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000003", "step-00000004"]
    assert first[-1].checkpoint == tmp_path / "run" / "step-00000004"
    rest, two = _train(family, CachedSource(reader), names, **options)
    assert _losses(first) + _losses(rest) == _losses(whole)
    assert [s.learning_rate for s in first + rest] == [s.learning_rate for s in whole]
    assert all(torch.equal(value, _lora(two)[name]) for name, value in _lora(one).items())


def test_a_killed_run_resumes_from_its_last_checkpoint(
    family: Family, reader: Any, names: list[str], tmp_path: Path
) -> None:
    whole, _ = _train(family, CachedSource(reader), names)
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    add_lora(transformer, family, CONFIG)
    run = train_lora(transformer, family, CachedSource(reader), names, CONFIG, checkpoint_dir=tmp_path)
    for _ in range(5):  # dies after step 5; step 3 was saved
        next(run)
    run.close()
    torn = tmp_path / ".step-00000006.123"  # what a kill in mid-save leaves
    torn.mkdir()
    (torn / "state.json").write_text("{")
    rest, _ = _train(family, CachedSource(reader), names, checkpoint_dir=tmp_path, resume=True)
    assert _losses(rest) == _losses(whole)[3:]


def test_a_finished_run_resumed_does_nothing(family: Family, reader: Any, names: list[str], tmp_path: Path) -> None:
    _train(family, CachedSource(reader), names, checkpoint_dir=tmp_path)
    again, _ = _train(family, CachedSource(reader), names, checkpoint_dir=tmp_path, resume=True)
    assert again == []


def test_a_checkpoint_of_another_run_is_refused_with_all_differences(
    family: Family, reader: Any, names: list[str], tmp_path: Path
) -> None:
    _train(family, CachedSource(reader), names, checkpoint_dir=tmp_path)
    other = CONFIG.model_copy(update={"learning_rate": 1e-3, "rank": 8, "optimizer": "torch.optim.SGD"})
    with pytest.raises(ConfigError) as caught:
        _train(family, CachedSource(reader), names[:3], other, checkpoint_dir=tmp_path, resume=True)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["optimizer", "rank"]
    with pytest.raises(ConfigError, match="already holds 3 checkpoints"):
        _train(family, CachedSource(reader), names, checkpoint_dir=tmp_path)


def test_a_loss_that_is_not_finite_names_the_sample_and_loses_nothing(
    family: Family, reader: Any, names: list[str], tmp_path: Path
) -> None:
    whole, _ = _train(family, CachedSource(reader), names)
    at_fault = next(iter(set(names) - set(whole[0].names)))  # so that the first step is taken
    good = reader.tensors[at_fault]
    reader.tensors[at_fault] = {**good, "image_latents": good["image_latents"] * torch.nan}
    config = CONFIG.model_copy(update={"checkpoint_every": 100})
    with pytest.raises(StageError, match=rf"the loss is nan .* not finite for {at_fault}; the batch was .*"):
        _train(family, CachedSource(reader), names, config, checkpoint_dir=tmp_path)
    [saved] = checkpoints(tmp_path)
    reader.tensors[at_fault] = good
    rest, _ = _train(family, CachedSource(reader), names, config, checkpoint_dir=tmp_path, resume=True)
    assert 0 < len(rest) < len(whole)
    assert _losses(rest) == _losses(whole)[-len(rest) :]


def test_dropout_uses_the_empty_prompt_everywhere(family: Family, reader: Any, names: list[str]) -> None:
    def emptied(tensors: Tensors) -> Tensors:
        return tensors | {n.removeprefix("empty_"): t for n, t in tensors.items() if n.startswith("empty_")}

    dropped, _ = _train(family, CachedSource(reader), names, caption_dropout=1.0)
    plain, _ = _train(family, CachedSource(reader), names)
    reader.tensors = {name: emptied(tensors) for name, tensors in reader.tensors.items()}
    empty, _ = _train(family, CachedSource(reader), names)
    # The draw that decides about dropout comes before the noise, so compare runs of equal draws.
    empty_with_draw, _ = _train(family, CachedSource(reader), names, caption_dropout=1e-9)
    assert _losses(dropped) == _losses(empty_with_draw)
    assert _losses(empty) != _losses(plain)


def test_without_a_lora_nothing_is_trained(family: Family, reader: Any, names: list[str]) -> None:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    with pytest.raises(ConfigError, match="call add_lora"):
        next(train_lora(transformer, family, CachedSource(reader), names, CONFIG))


def test_a_second_lora_is_refused(family: Family) -> None:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    add_lora(transformer, family, CONFIG)
    with pytest.raises(ModelError, match="already has an adapter"):
        add_lora(transformer, family, CONFIG)


def test_the_saved_file_tells_its_settings_and_replaces_the_former_at_once(family: Family, tmp_path: Path) -> None:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    add_lora(transformer, family, CONFIG)
    save_lora(transformer, family, tmp_path, {"steps": 1})
    file = save_lora(transformer, family, tmp_path, {"steps": 2, "data": "edits"})
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert read_settings(tmp_path) == {"steps": 2, "data": "edits"}


def test_a_16_bit_model_trains_a_32_bit_lora(family: Family, reader: Any, names: list[str], tmp_path: Path) -> None:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer.to(torch.bfloat16)
    parameters = add_lora(transformer, family, CONFIG)
    states = list(train_lora(transformer, family, CachedSource(reader), names, CONFIG, checkpoint_dir=tmp_path))
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    reference, _ = _train(family, CachedSource(reader), names)
    assert states[0].loss == pytest.approx(reference[0].loss, rel=0.02)
    assert json.loads((states[-1].checkpoint / "state.json").read_text())["step"] == 8
