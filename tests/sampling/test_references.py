"""Sampling shows the transformer the references that it was trained with, in every family that takes some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dittocache.data.sample import Sample
from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import ConfigError
from dittocache.families.base import Sizes
from dittocache.families.registry import get_family
from dittocache.sampling.config import GenerateConfig
from dittocache.sampling.generate import generate

CONFIG = GenerateConfig(num_inference_steps=2)
COUNTS = {"qwen-image-edit": 1, "qwen-image-edit-plus": 2, "flux-kontext": 1}


@pytest.fixture(scope="module", params=COUNTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(name: str) -> Any:
    return tiny_pipeline(name)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for number, size in enumerate([(150, 100), (70, 90)]):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(tmp_path / f"{number}.png")
    return [tmp_path / "0.png", tmp_path / "1.png"]


@pytest.mark.parametrize("control_resolution", [None, 64, "own"])
@pytest.mark.parametrize("sizes", [Sizes(96, 64), Sizes(128, 96)], ids=str)
def test_references_and_prompts_are_those_of_training(
    name: str, pipe: Any, files: list[Path], control_resolution: Any, sizes: Sizes
) -> None:
    family = get_family(name)
    controls = tuple(files[: 1 if control_resolution == "own" else COUNTS[name]])
    sample = Sample("a", files[0], controls, "make it red", (64, 64), control_resolution=control_resolution)
    trained: dict[str, torch.Tensor] = {}
    for encoder in family.encoders:
        trained |= family.encode(pipe, encoder, [sample], sizes)[0]
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    made = generate(pipe, controls, "make it red", CONFIG, sizes, control_resolution=control_resolution)
    hook.remove()
    noise = made.image.width // 16 * (made.image.height // 16)
    assert torch.equal(seen[0]["hidden_states"][0, noise:], trained["control_latents"])
    assert torch.equal(seen[0]["encoder_hidden_states"][0], trained["prompt_embeds"])


@pytest.mark.parametrize("name", ["qwen-image-edit-plus"], indirect=True)
def test_references_of_two_areas_cannot_keep_their_own(name: str, pipe: Any, files: list[Path]) -> None:
    with pytest.raises(ConfigError, match="found pictures of 2 areas that are to keep their own"):
        generate(pipe, files, "a", CONFIG, Sizes(96, 64), control_resolution="own")
