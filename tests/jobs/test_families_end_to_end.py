"""Every family from a folder of pictures to a LoRA in its stock pipeline, through the stages, on tiny checkpoints.

Cached, mixed and live training give the same numbers bit for bit, and each loads only what it needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.jobs.conftest import draw_set
from tests.jobs.test_whole_run import carry_out

from dittocache.config import RunConfig, check_config
from dittocache.demo.tiny import save_tiny
from dittocache.events import Event
from dittocache.families.loading import component_names
from dittocache.families.registry import FAMILIES
from dittocache.jobs.edits import make_picture
from dittocache.jobs.generation import chosen_edits
from dittocache.jobs.inputs import RunInputs
from dittocache.training.lora import WEIGHT_NAME

CACHED = ("validate", "cache_latents", "cache_text")
TRAIN = {"steps": 2, "rank": 2, "batch_size": 2, "learning_rate": 0.05, "warmup_steps": 0, "lr_schedule": "constant"}


@pytest.fixture(params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunConfig:
    """A run of the family: four samples of two sizes, one with a mask, two held out; a picture of the last step."""
    name: str = request.param
    edits = "image" in inspect.signature(getattr(diffusers, FAMILIES[name].pipeline_class_name).__call__).parameters
    data, held_out = draw_set(tmp_path / "data", 4), draw_set(tmp_path / "held_out", 2, seed=1)
    Image.new("L", (64, 64)).save(data / "training_images" / "edit-1_mask.png")
    with Image.open(data / "training_images" / "edit-1_mask.png") as mask:
        mask.paste(255, (0, 0, 32, 64))
        mask.save(data / "training_images" / "edit-1_mask.png")
    with Image.open(data / "training_images" / "edit-3.png") as picture:
        picture.resize((96, 48)).save(data / "training_images" / "edit-3.png")
    for folder in () if edits else (data, held_out):
        for file in (folder / "control_images").iterdir():
            file.unlink()
        (folder / "control_images").rmdir()
    return check_config(
        {
            "name": "cached",
            "output_dir": tmp_path / "runs",
            "held_out": held_out,
            "model": {
                "path": str(save_tiny(tmp_path / "model", name)),
                "family": name,
                "dtype": "float32",
                "device": "cpu",
            },
            "data": {"path": data, "resolution": 64, "condition_resolution": 32, "caption_dropout": 0.3},
            "cache": {"cache_dir": tmp_path / "cache"},
            "train": {**TRAIN, "validate_every": 2, "validation_pictures": 2},
            "generate": {"num_inference_steps": 2, "true_cfg_scale": 1.5, "negative_prompt": "grey"},
        }
    )


@pytest.fixture
def loaded(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[str]]]:
    """The components of every pipeline that is loaded, in order."""
    calls: list[set[str]] = []
    family = FAMILIES[str(run.model.family)]
    original = type(family).load_pipeline

    def noted(self: Any, model: str, components: Sequence[str], *rest: Any) -> Any:
        calls.append(set(components))
        return original(self, model, components, *rest)

    monkeypatch.setattr(type(family), "load_pipeline", noted)
    yield calls


def test_cached_mixed_and_live_are_one_training_whose_lora_the_stock_pipeline_takes(
    run: RunConfig, loaded: list[set[str]]
) -> None:
    family = FAMILIES[str(run.model.family)]
    encoders = set(family.encoders)
    text = [name for name in family.encoders if name != "vae"]
    carry_out(run, *CACHED)
    loaded.clear()
    plans: list[Any] = []
    cached = _losses(run, plans)
    weights = sum(file.stat().st_size for file in (Path(run.model.path) / "transformer").glob("*.safetensors"))
    assert [plan["weights"] for plan in plans] == [pytest.approx(weights, rel=0.05)]  # the files have headers too
    assert plans[0]["activations"] > 0
    weighty = [components & {"transformer", *encoders} for components in loaded]
    assert weighty == [*({name} for name in text), {"transformer"}, {"vae"}]  # prompts of held-out pictures first
    assert any(bool(tensor.abs().max() > 0) for name, tensor in _lora(run).items() if "lora_B" in name)

    mixed = _renamed(run, "mixed")
    (run.output_dir / "mixed").mkdir()
    (mixed.run_dir / "manifest.json").write_bytes((run.run_dir / "manifest.json").read_bytes())
    for record in sorted((Path(run.cache.cache_dir) / "objects").rglob("*.safetensors"))[::2]:
        record.unlink()
    live = _renamed(run, "live", {"cache.use_cache": False})
    for other in (mixed, live):
        loaded.clear()
        assert _losses(other) == cached
        assert all(torch.equal(tensor, _lora(other)[name]) for name, tensor in _lora(run).items())
        assert {"vae"} in [components & encoders for components in loaded]

    _check_pictures(run, FAMILIES[str(run.model.family)])


@pytest.mark.parametrize("run", ["qwen-image-edit-plus"], indirect=True)
def test_cached_training_loads_the_transformer_and_nothing_else(run: RunConfig, loaded: list[set[str]]) -> None:
    quiet = check_config(run.model_dump(), {"train.validate_every": None})
    carry_out(quiet, *CACHED)
    loaded.clear()
    carry_out(quiet, "train")
    assert loaded == [{"transformer"}]


def _check_pictures(run: RunConfig, family: Any) -> None:
    """The pictures made in training are those that the stock pipeline draws from words, with the LoRA as saved."""
    inputs = RunInputs(run, run.run_dir)
    pipe = family.load_pipeline(inputs.model, component_names(inputs.model), inputs.dtype, "cpu")
    assert type(pipe) is getattr(diffusers, family.pipeline_class_name)
    edits = chosen_edits(inputs)
    without = make_picture(inputs, pipe, edits[0], 0).image
    pipe.load_lora_weights(str(run.run_dir / "lora"))
    for number, edit in enumerate(edits):
        with Image.open(run.run_dir / "samples" / "step-2" / f"{edit.name}.png") as made:
            drawn = make_picture(inputs, pipe, edit, number).image
            assert made.tobytes() == drawn.tobytes(), edit.name
            assert number > 0 or made.tobytes() != without.tobytes()


def _renamed(run: RunConfig, name: str, changes: dict[str, Any] | None = None) -> RunConfig:
    return check_config(run.model_dump(), {"name": name, "train.validate_every": None, **(changes or {})})


def _losses(run: RunConfig, plans: list[Any] | None = None) -> list[float]:
    """Train; the loss of each step. Memory plans that are told are added to `plans`."""
    losses: list[float] = []

    def note(event: Event) -> None:
        if plans is not None and "memory_plan" in event:
            assert losses == []
            plans.append(event["memory_plan"])
        if event["kind"] == "metric":
            losses.append(event["loss"])

    carry_out(run, "train", listener=note)
    return losses


def _lora(run: RunConfig) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(run.run_dir / "lora" / WEIGHT_NAME)
    return weights
