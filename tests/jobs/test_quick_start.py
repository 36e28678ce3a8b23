"""A data set and a model are enough: what is chosen, what is said, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.jobs.conftest import draw_set

from dittocache.config import BUNDLED, RunConfig, load_config, save_config
from dittocache.demo.model import SAMPLES_DIR
from dittocache.demo.tiny import save_tiny
from dittocache.errors import ConfigError
from dittocache.families.defaults import suggested_settings
from dittocache.families.registry import FAMILIES
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.live_encoders import LiveEncoders
from dittocache.jobs.quick_start import quick_config, steps_for
from dittocache.jobs.run_names import run_name
from dittocache.jobs.training_memory import (
    encoder_bytes,
    fit_to_memory,
    free_machine_bytes,
    live_encoder_bytes,
    sample_size,
)
from dittocache.training.fitting import CHOICES
from dittocache.training.memory_plan import RESERVED

GB = 10**9


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return draw_set(tmp_path / "my pictures", 6)


@pytest.fixture
def choose(place: Path, tiny_model: Path) -> Callable[..., tuple[RunConfig, list[str]]]:
    def run(data: Any = place, model: Any = tiny_model, **overrides: Any) -> tuple[RunConfig, list[str]]:
        said: list[str] = []
        named = {name.replace("__", "."): value for name, value in overrides.items()}
        found = quick_config(
            None if data is None else str(data), None if model is None else str(model), named, said.append
        )
        return found, said

    return run


@pytest.mark.parametrize(
    ("samples", "a_step", "steps"),
    [(1, 1, 500), (5, 1, 500), (20, 1, 2000), (20, 4, 500), (37, 2, 1850), (40, 1, 4000), (10_000, 8, 4000)],
)
def test_steps_follow_from_the_size_of_the_set(samples: int, a_step: int, steps: int) -> None:
    assert steps_for(samples, a_step) == steps


@pytest.mark.parametrize(
    ("path", "name"),
    [("data/My Cats (2)", "My-Cats-2"), ("pictures.csv", "pictures"), ("/", "run"), ("a/.hidden", "hidden")],
)
def test_a_run_is_named_after_its_data(path: str, name: str) -> None:
    assert run_name(path) == name


def test_everything_is_chosen_and_said(choose: Any, tiny_model: Path, place: Path) -> None:
    config, said = choose()
    assert (config.run_dir, config.cache.cache_dir) == (Path("runs/my-pictures"), Path("cache"))
    assert (config.data.path, config.model.path) == (place, str(tiny_model))
    assert (config.train.timestep_sampling, config.train.shift_tokens) == ("resolution_shifted", (256, 8192))
    assert config.train.steps == 600
    assert config.generate.true_cfg_scale == 4.0
    assert (config.train.gradient_checkpointing, config.train.base_quantization) == (False, "none")  # on the CPU
    assert said[0].startswith("run runs/my-pictures: 6 samples, a qwen-image-edit-plus")
    assert said[1].startswith("600 steps of 1 sample(s), each seen about 100 times")


def test_the_user_has_the_last_word_in_either_spelling(choose: Any) -> None:
    config, said = choose(
        name="other", train__max_train_steps="7", train__timestep_sampling="uniform", train__checkpointing_steps="3"
    )
    assert (config.run_dir, config.train.steps) == (Path("runs/other"), 7)
    assert (config.train.timestep_sampling, config.train.checkpoint_every) == ("uniform", 3)
    assert not any("steps of" in line for line in said)
    assert choose(train__epochs="2")[0].train.epochs == 2


def test_the_bundled_model_is_trained_as_in_the_demo(choose: Any) -> None:
    config, said = choose(data=SAMPLES_DIR / "train", model=BUNDLED)
    assert (config.data.resolution, config.data.condition_resolution, config.model.dtype) == (128, 64, "float32")
    assert (config.train.steps, config.train.learning_rate, config.train.batch_size) == (200, 2e-3, 4)
    assert config.model.device == "auto"
    assert any(line.startswith("200 steps") for line in said)


def test_a_run_that_is_there_goes_on_with_its_settings(choose: Any, tmp_path: Path) -> None:
    first, _ = choose(train__steps="9")
    save_config(first, first.run_dir / "config.yaml")
    again, said = choose(train__rank="3")
    assert (again.train.steps, again.train.rank) == (9, 3)
    assert said == ["going on with the settings of runs/my-pictures/config.yaml; --name NAME begins another run"]
    assert load_config(first.run_dir / "config.yaml") == first
    other = draw_set(tmp_path / "elsewhere" / "my pictures", 1)
    with pytest.raises(ConfigError, match="give this one another --name"):
        choose(data=other)


def test_all_problems_are_listed_at_once(choose: Any, tmp_path: Path) -> None:
    bare = draw_set(tmp_path / "bare", 2)
    for caption in bare.rglob("*.txt"):
        caption.unlink()
    with pytest.raises(ConfigError) as caught:
        choose(data=bare, model=tmp_path / "none", train__stpes="3")
    by_start = {problem.partition(":")[0] for problem in caught.value.problems}
    assert by_start == {"train.stpes", "model.path", "data.path"}
    assert sum("caption" in problem for problem in caught.value.problems) == 2
    with pytest.raises(ConfigError) as caught:
        choose(data=tmp_path / "nowhere", model=None)
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == ["--model", "data.path:"]
    with pytest.raises(ConfigError, match="--data is missing"):
        choose(data=None)


def test_memory_is_looked_at_on_a_gpu_only_and_only_where_the_user_said_nothing(
    choose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunInputs, "device", "cuda")
    free = [24 * GB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 24 * GB))
    config, said = choose()
    assert not config.train.gradient_checkpointing
    assert said[2].endswith("nothing has to be saved")
    free[0] = 1
    config, said = choose()
    assert (config.train.gradient_checkpointing, config.train.offload) == (True, "none")
    assert "training needs at least about" in said[2]
    assert len(choose(train__base_quantization="fp8", train__gradient_checkpointing="true")[1]) == 2


def test_what_is_free_follows_from_the_machine() -> None:
    assert 10**8 < free_machine_bytes() < 10**14


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_fitted_before_anything_is_loaded(family: str, tmp_path: Path) -> None:
    data = draw_set(tmp_path / "data", 3)
    if "edit" not in family and "kontext" not in family:
        for file in [*(data / "control_images").iterdir()]:
            file.unlink()
        (data / "control_images").rmdir()
    options = {"guidance": False} if family == "flux-schnell" else {}
    model = save_tiny(tmp_path / "model", "flux" if family == "flux-schnell" else family, **options)
    said: list[str] = []
    small = {"data.resolution": "64", "data.condition_resolution": "32", "output_dir": str(tmp_path / "runs")}
    config = quick_config(str(data), str(model), small, said.append)
    inputs = RunInputs(config, config.run_dir)
    assert inputs.family.name == family
    for name, value in suggested_settings(family).items():
        section, _, field = name.partition(".")
        assert getattr(getattr(config, section), field) == value
    size = sample_size(inputs)
    assert size.noise == 16 and size.text > 1
    assert fit_to_memory(inputs, 24 * GB, GB).choice == CHOICES[0]
    weights = encoder_bytes(model, inputs.family, inputs.dtype)
    assert weights.keys() == inputs.family.encoders.keys() and all(weights.values())


def test_live_training_leaves_less_for_the_transformer(choose: Any) -> None:
    cached, live = (choose(cache__use_cache=value)[0] for value in ("true", "false"))
    inputs = RunInputs(live, live.run_dir)
    plain = fit_to_memory(RunInputs(cached, cached.run_dir), 24 * GB, GB).plan.device_total
    enough = plain + RESERVED
    assert fit_to_memory(RunInputs(cached, cached.run_dir), enough, GB).choice == CHOICES[0]
    assert fit_to_memory(inputs, enough, GB).choice != CHOICES[0]
    assert live_encoder_bytes(RunInputs(cached, cached.run_dir)) == 0
    loaded = {name: getattr(LiveEncoders(inputs, "cpu")[name], name) for name in inputs.family.encoders}
    sizes = {name: sum(one.nbytes for one in part.parameters()) for name, part in loaded.items()}
    assert live_encoder_bytes(inputs) == sum(sizes.values())
    moved = choose(cache__use_cache="false", cache__devices={"text_encoder": "cuda"}, name="moved")[0]
    assert live_encoder_bytes(RunInputs(moved, moved.run_dir)) == sizes["vae"]
