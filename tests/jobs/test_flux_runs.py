"""Runs of the FLUX families from folder to pictures: references, sizes, and prompts from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tests.jobs.conftest import draw_set
from tests.jobs.test_whole_run import carry_out

from dittocache.config import RunConfig, check_config
from dittocache.demo.tiny import save_tiny
from dittocache.jobs.generation import chosen_edits
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.picture_prompts import cached_prompts

CACHED = ("validate", "cache_latents", "cache_text")


@pytest.fixture(scope="session")
def flux_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux")
    return {name: save_tiny(folder / name, name) for name in ("flux", "flux-kontext")}


def config_of(family_name: str, model: Path, tmp_path: Path) -> RunConfig:
    """Three samples and their mirrored twins; edits for Kontext."""
    data = draw_set(tmp_path / "data", 3)
    if family_name == "flux":
        for control in (data / "control_images").iterdir():
            control.unlink()
        (data / "control_images").rmdir()
        Image.new("RGB", (96, 64), "green").save(data / "training_images" / "edit-0.png")
    return check_config(
        {
            "output_dir": tmp_path / "runs",
            "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
            "data": {"path": data, "resolution": 64, "flip": True},
            "cache": {"cache_dir": tmp_path / "cache"},
            "train": {"steps": 2, "rank": 2, "learning_rate": 0.05, "validate_every": 2},
            "generate": {"num_inference_steps": 2},
        }
    )


@pytest.fixture(params=["flux", "flux-kontext"])
def run(request: pytest.FixtureRequest, flux_models: dict[str, Path], tmp_path: Path) -> RunConfig:
    return config_of(request.param, flux_models[request.param], tmp_path)


def test_a_run_ends_with_the_pictures_that_training_saw_last(run: RunConfig) -> None:
    carry_out(run, *CACHED, "train", "generate")
    samples = run.run_dir / "samples"
    names = sorted(path.name for path in samples.glob("*.png"))
    # Mirrored twins are trained on, and not shown beside their originals.
    assert names == [f"edit-{number}-{kind}.png" for number in range(3) for kind in ("base", "lora")]
    for number in range(2):
        final = (samples / f"edit-{number}-lora.png").read_bytes()
        assert final == (samples / "step-2" / f"edit-{number}.png").read_bytes()
        assert final != (samples / f"edit-{number}-base.png").read_bytes()
    if "control_images" not in {path.name for path in Path(str(run.data.path)).iterdir()}:
        # Without a reference a picture has its sample's ratio.
        assert Image.open(samples / "edit-0-base.png").size == (80, 48)
        assert Image.open(samples / "edit-1-base.png").size == (64, 64)


def test_pictures_of_training_samples_take_both_prompts_from_the_cache(run: RunConfig) -> None:
    carry_out(run, *CACHED)
    inputs = RunInputs(run, run.run_dir)
    edits = chosen_edits(inputs)
    found = cached_prompts(inputs, edits)
    assert list(found) == [edit.name for edit in edits]
    shapes = {name: tuple(tensor.shape) for name, tensor in found[edits[0].name].items()}
    assert shapes == {"prompt_embeds": (1, 512, 32), "pooled_prompt_embeds": (1, 32)}


def test_a_picture_of_ones_own_is_brought_to_the_size_of_training(flux_models: dict[str, Path], tmp_path: Path) -> None:
    run = config_of("flux-kontext", flux_models["flux-kontext"], tmp_path)
    settings = {"data.control_resolution": 32, "generate.image": [str(tmp_path / "a.png")], "generate.prompt": "a"}
    [edit] = chosen_edits(RunInputs(check_config(run.model_dump(), settings), run.run_dir))
    assert edit.control_resolution == 32
