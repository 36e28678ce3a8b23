"""A run with isolated references: its LoRA says so, its pictures are made so, and nothing else goes on from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.jobs.conftest import draw_set
from tests.jobs.test_whole_run import carry_out

import dittocache
from dittocache.config import RunConfig
from dittocache.errors import ConfigError
from dittocache.families.denoiser import is_isolated
from dittocache.families.pictures import open_picture
from dittocache.jobs import edits
from dittocache.jobs.generation import use_lora
from dittocache.jobs.run_folder import CHECKPOINTS_NAME, LORA_NAME
from dittocache.training.checkpoint import checkpoints
from dittocache.training.lora import WEIGHT_NAME, read_reference_visibility

CACHED = ("validate", "cache_latents", "cache_text")
pytestmark = pytest.mark.usefixtures("encoded")


def _isolated(config: RunConfig, **settings: Any) -> RunConfig:
    train = config.train.model_copy(update={"reference_visibility": "isolated", **settings})
    return config.model_copy(update={"train": train})


def test_the_lora_says_how_it_was_trained_and_pictures_are_made_so(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    stock = edits.generate

    def watched(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(is_isolated(pipe.transformer))
        return stock(pipe, *args, **kwargs)

    monkeypatch.setattr(edits, "generate", watched)
    config = _isolated(config, validate_every=2, validation_pictures=1, learning_rate=1e-2)
    config = config.model_copy(update={"teacache": None})
    carry_out(config, *CACHED, "train")
    assert made == [True]  # on the way
    folder = config.run_dir / LORA_NAME
    with safe_open(folder / WEIGHT_NAME, framework="pt") as stream:
        assert stream.metadata()["reference_visibility"] == "isolated"
    assert read_reference_visibility(folder) == "isolated"

    made.clear()
    found = carry_out(config, "generate")["generate"]
    assert not any(made[:3])  # the warm-up and the two held-out edits without the LoRA
    assert all(made[3:])
    # The measured caches are exact: the same picture with the references' keys and values kept.
    for row in found["compared"]:
        pictures = {one["label"]: open_picture(config.run_dir / one["picture"]) for one in row["variants"]}
        assert pictures["Reference KV"].tobytes() == pictures["Uncached"].tobytes()


def test_a_stock_pipeline_needs_one_line_more(config: RunConfig) -> None:
    config = _isolated(config, learning_rate=1e-2)
    carry_out(config, *CACHED, "train")
    folder, family = config.run_dir / LORA_NAME, _family(config)
    ours, theirs = (family.load_pipeline(config.model.path, ["transformer"], torch.float32, "cpu") for _ in range(2))
    use_lora(ours, folder)
    theirs.load_lora_weights(folder)
    dittocache.isolate_references(theirs)
    generator = torch.Generator().manual_seed(0)
    transformer = ours.transformer
    kwargs = {
        "hidden_states": torch.randn(1, 32, transformer.config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, transformer.config.joint_attention_dim, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4), (1, 4, 4)]],
        "return_dict": False,
    }
    with torch.no_grad():
        assert torch.equal(ours.transformer(**kwargs)[0], theirs.transformer(**kwargs)[0])


def _family(config: RunConfig) -> Any:
    from dittocache.families.registry import family_of_model

    return family_of_model(config.model.path)


@pytest.mark.parametrize("first", ["full", "isolated"])
def test_a_run_does_not_go_on_with_another_visibility(config: RunConfig, first: str) -> None:
    other = {"full": "isolated", "isolated": "full"}[first]
    begun = _isolated(config, reference_visibility=first)
    carry_out(begun, *CACHED, "train")
    folder = config.run_dir / CHECKPOINTS_NAME
    (folder / "finished").unlink()
    shutil.rmtree(checkpoints(folder)[-1])
    with pytest.raises(ConfigError) as refused:
        carry_out(_isolated(config, reference_visibility=other), "train")
    assert list(refused.value.problems) == [
        f"reference_visibility: the checkpoint has {first!r}, this run has {other!r}",
    ]


def test_samples_without_references_are_found_before_anything_is_loaded(config: RunConfig, tmp_path: Path) -> None:
    folder = draw_set(tmp_path / "text to image", 2)
    shutil.rmtree(folder / "control_images")
    data = config.data.model_copy(update={"path": folder})
    with pytest.raises(ConfigError) as refused:
        carry_out(_isolated(config).model_copy(update={"data": data, "held_out": None}), "validate")
    [problem] = [one for one in refused.value.problems if "reference_visibility" in one]
    assert "found isolated, but 2 sample(s) of family qwen-image-edit-plus have no control picture" in problem
    assert "the first edit-0" in problem
