"""Tiny pipelines: the same seed gives the same weights, and every input shows in the picture."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from PIL import Image

from dittocache.demo.model import DEMO_SIZES
from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import ModelError
from dittocache.families.qwen_image_sizes import pipeline_sizes

NAMES = ["qwen-image-edit-plus", "qwen-image", "flux", "flux-schnell", "flux-kontext"]


def _picture(pipe: Any, prompt: str, shade: int = 0, seed: int = 0) -> torch.Tensor:
    options: dict[str, Any] = {}
    if "Kontext" in type(pipe).__name__:
        options |= {"max_area": 64 * 64, "_auto_resize": False}
    if "Edit" in type(pipe).__name__ or "Kontext" in type(pipe).__name__:
        options["image"] = [Image.linear_gradient("L").convert("RGB").point(lambda value: (value + shade) % 256)]
    if "Qwen" in type(pipe).__name__:
        options["true_cfg_scale"] = 1.0
    with pipeline_sizes(DEMO_SIZES):
        latents: torch.Tensor = pipe(
            prompt=prompt,
            height=64,
            width=64,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **options,
        ).images
    return latents


@pytest.mark.parametrize("name", NAMES)
def test_weights_follow_the_seed_and_leave_the_callers_numbers_alone(name: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, third = (tiny_pipeline(name, seed=seed).transformer.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_every_input_shows_in_the_picture(name: str) -> None:
    pipe = tiny_pipeline(name)
    base = _picture(pipe, "make it red")
    assert torch.equal(_picture(pipe, "make it red"), base)
    changes = [_picture(pipe, "remove the blue square"), _picture(pipe, "make it red", seed=1)]
    if "edit" in name or "kontext" in name:
        changes.append(_picture(pipe, "make it red", shade=120))
    for changed in changes:
        assert (changed - base).norm() / base.norm() > 0.01


def test_building_is_quick() -> None:
    tiny_pipeline("qwen-image-edit-plus")  # imports
    started = time.perf_counter()
    tiny_pipeline("qwen-image-edit-plus")
    assert time.perf_counter() - started < 1


def test_an_unknown_family_is_an_error() -> None:
    with pytest.raises(ModelError, match="no tiny pipeline of family 'sdxl'; there are qwen-image, "):
        tiny_pipeline("sdxl")
