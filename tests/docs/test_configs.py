"""Every shipped config loads, fits the GPU in its name, and carries out a training of a tiny model of its family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tests.docs.cards import ENCODERS, REFERENCES, TEXT_TOKENS, LiveBytes, transformer_folder, vae_of
from tests.jobs.conftest import draw_set

from dittocache.config import RunConfig, load_config
from dittocache.demo.tiny import save_tiny
from dittocache.events import EventLog, read_events
from dittocache.families.defaults import suggested_settings
from dittocache.families.registry import FAMILIES, get_family
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.stages import STAGES, TRAIN
from dittocache.training.config import TrainConfig
from dittocache.training.memory_plan import RESERVED, BatchSize, plan_of
from dittocache.training.transformer_facts import TransformerFacts, transformer_facts

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("**/*.yaml"))
CARDS = [path for path in CONFIGS if re.search(r"-\d+gb$", path.stem)]
SIZES = (24, 48, 80)
PACKED = 16  # pixels a side of one packed latent, in every family


def each(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_there_is_a_config_for_each_family_and_card() -> None:
    named = {
        f"{name}-{size}gb"
        for name in ("qwen-image", "qwen-image-edit", "qwen-image-edit-plus", "flux-dev", "flux-kontext")
        for size in SIZES
    }
    assert {path.stem for path in CONFIGS} == named | {"demo"}


@each(CONFIGS)
def test_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.model.family is None or config.model.family in FAMILIES


@each(CARDS)
def test_configs_are_of_their_family(path: Path) -> None:
    config = load_config(path)
    assert config.model.family == path.stem.rpartition("-")[0].replace("flux-dev", "flux")
    for name, value in suggested_settings(config.model.family).items():
        section, _, field = name.partition(".")
        assert getattr(getattr(config, section), field) == value, name
    text = path.read_text()
    assert text.count(f"configs/{path.name}") == 2, "the commands in the header are those of this file"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The counts of a published architecture for a batch, at 1024 pixels and with the references of its family."""
    folders: dict[str, Path] = {}

    @cache
    def facts(family_name: str, batch_size: int, rank: int, side: int) -> TransformerFacts:
        family = get_family(family_name)
        if family_name not in folders:
            place = tmp_path_factory.mktemp("real") / family_name
            folders[family_name] = transformer_folder(place, family_name, family.transformer.class_name)
        shapes = ((1, side // PACKED, side // PACKED),) * (1 + REFERENCES[family_name])
        config = TrainConfig(batch_size=batch_size, rank=rank)
        size = BatchSize(shapes, TEXT_TOKENS[family_name])
        return transformer_facts(folders[family_name], family, config, torch.bfloat16, size)

    return facts


@each(CARDS)
def test_configs_fit_their_card(path: Path, real: Any) -> None:
    config = load_config(path)
    card = int(re.search(r"(\d+)gb", path.stem)[1]) * 10**9  # type: ignore[index]
    facts = real(config.model.family, config.train.batch_size, config.train.rank, config.data.resolution)
    plan = plan_of(facts, config.train)
    assert plan.device_total + RESERVED <= card, plan.describe()
    said = re.search(r"The memory plan at 1024 pixels[^:]*: about (\d+) GB", path.read_text())
    assert said is not None
    assert float(said[1]) == pytest.approx(plan.device_total / 1e9, abs=1)


@pytest.mark.parametrize(("family", "weights"), [("qwen-image-edit-plus", 40.9e9), ("flux", 23.8e9)])
def test_the_architectures_are_the_published_ones(family: str, weights: float, real: Any) -> None:
    assert real(family, 1, 16, 1024).weights == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_largest_encoder_fits_the_smallest_card_alone(encoder: str) -> None:
    assert 2 * ENCODERS[encoder] + RESERVED < 0.8 * min(SIZES) * 10**9  # a fifth is left for what it computes


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate remembers the first settings of a process; forget them before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_vae_encodes_a_large_picture_on_the_smallest_card(family: str) -> None:
    vae = vae_of(family)
    frames = (1,) if family.startswith("qwen") else ()
    with torch.no_grad(), LiveBytes() as live:
        latents = vae.encode(torch.empty(1, 3, *frames, 1024, 1024, dtype=torch.bfloat16, device="meta"))[0].mode()
    assert latents.shape[-2:] == (128, 128)
    weights = sum(one.nbytes for one in vae.parameters())
    assert 1e9 < live.peak < 8e9
    assert weights + 2 * live.peak + RESERVED < min(SIZES) * 10**9  # as much again for what convolutions unfold


@cache
def tiny_checkpoint(root: Path, family_name: str) -> Path:
    return save_tiny(root / family_name, family_name)


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def on_a_tiny_model(path: Path, tiny_root: Path, place: Path) -> RunConfig:
    """The shipped config as it is, but for the model, the data, their sizes and the device."""
    family = load_config(path).model.family or "qwen-image-edit-plus"
    data = draw_set(place / "data", 3)
    if REFERENCES[family] == 0:
        for file in (data / "control_images").iterdir():
            file.unlink()
        (data / "control_images").rmdir()
    small = {
        "model.path": str(tiny_checkpoint(tiny_root, family)),
        "model.device": "cpu",
        "data.path": str(data),
        "data.resolution": "64",
        "data.condition_resolution": "32",
        "held_out": None,
        "output_dir": str(place / "runs"),
        "cache.cache_dir": str(place / "cache"),
        "cache.num_workers": "0",
        "train.steps": "2",
        "train.rank": "2",
    }
    return load_config(path, small)


@each(CONFIGS)
def test_configs_carry_out_a_training(path: Path, tiny_root: Path, tmp_path: Path, fresh_accelerate: None) -> None:
    config = on_a_tiny_model(path, tiny_root, tmp_path)
    log = EventLog(tmp_path / "events.jsonl", "test")
    for stage in TRAIN:
        STAGES[stage].load()(RunInputs(config, config.run_dir), log)
    assert (config.run_dir / "lora" / "pytorch_lora_weights.safetensors").is_file()
    events = list(read_events(tmp_path / "events.jsonl"))
    assert [event["step"] for event in events if "loss" in event] == [1, 2]
    assert any("memory_plan" in event for event in events)
