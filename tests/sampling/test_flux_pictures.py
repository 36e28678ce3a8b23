"""Pictures of the FLUX pipelines: the references of training, guidance, steps, sizes, and prompts from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dittocache.config import check_config
from dittocache.data.sample import Sample
from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import ConfigError
from dittocache.families.base import Sizes
from dittocache.families.registry import get_family
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.config import GenerateConfig
from dittocache.sampling.generate import generate
from dittocache.teacache.config import TeaCacheConfig

SIZES = Sizes(resolution=96)
CONFIG = GenerateConfig(num_inference_steps=2)
NAMES = ["flux", "flux-schnell", "flux-kontext"]


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {name: tiny_pipeline(name) for name in NAMES}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 18, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((150, 100))


@contextmanager
def calls(pipe: Any) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of the transformer."""
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def pixels(image: Image.Image) -> Any:
    return np.asarray(image).tolist()


def test_kontext_is_the_stock_pipeline_bit_for_bit(pipes: dict[str, Any], picture: Image.Image) -> None:
    pipe = pipes["flux-kontext"]
    stock = pipe(
        image=picture.resize((112, 80), Image.Resampling.LANCZOS),
        prompt="make it red",
        width=112,
        height=80,
        max_area=112 * 80,
        _auto_resize=False,
        guidance_scale=2.5,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    config = GenerateConfig(num_inference_steps=3)
    for teacache, reference_kv in ((None, None), (TeaCacheConfig(rel_l1_thresh=0), ReferenceKVConfig(refresh=1))):
        found = generate(pipe, [picture], "make it red", config, SIZES, teacache, reference_kv)
        assert pixels(found.image) == pixels(stock)
    reused = generate(pipe, [picture], "make it red", config, SIZES, reference_kv=ReferenceKVConfig(refresh=(0,)))
    assert reused.trace.bytes_held > 0
    assert [step.references for step in reused.trace.steps] == ["computed", "reused", "reused"]


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [("flux", None, 3.5), ("flux", 1.5, 1.5), ("flux-kontext", None, 2.5), ("flux-kontext", 4.0, 4.0)],
)
def test_guided_models_are_told_their_guidance(
    pipes: dict[str, Any], picture: Image.Image, name: str, scale: float | None, expected: float
) -> None:
    images = [picture] if name == "flux-kontext" else []
    with calls(pipes[name]) as seen:
        generate(pipes[name], images, "a", CONFIG.model_copy(update={"guidance_scale": scale}), SIZES)
    assert [call["guidance"].tolist() for call in seen] == [[expected]] * 2


def test_guidance_that_would_be_ignored_is_an_error(pipes: dict[str, Any]) -> None:
    with calls(pipes["flux-schnell"]) as seen:
        generate(pipes["flux-schnell"], [], "a", CONFIG, SIZES)
    assert [call["guidance"] for call in seen] == [None, None]
    guided = CONFIG.model_copy(update={"guidance_scale": 3.5})
    for pipe in (pipes["flux-schnell"], tiny_pipeline("qwen-image")):
        with pytest.raises(ConfigError, match=r"generate\.guidance_scale is 3\.5, but this \w+ is not guidance"):
            generate(pipe, [], "a", guided, SIZES)


@pytest.mark.parametrize("name", ["flux", "flux-kontext"])
def test_classifier_free_guidance_is_a_second_pass(pipes: dict[str, Any], name: str) -> None:
    with calls(pipes[name]) as seen:
        generate(pipes[name], [], "a", CONFIG.model_copy(update={"true_cfg_scale": 2.0}), SIZES)
    assert len(seen) == 4


@pytest.mark.parametrize(("name", "steps"), [("flux", 28), ("flux-schnell", 4)])
def test_the_usual_steps(pipes: dict[str, Any], name: str, steps: int) -> None:
    with calls(pipes[name]) as seen:
        generate(pipes[name], [], "a", GenerateConfig(width=32, height=32), SIZES)
    assert len(seen) == steps


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_text_to_image(pipes: dict[str, Any], name: str) -> None:
    def size(config: GenerateConfig, sizes: Sizes = SIZES) -> tuple[int, int]:
        return generate(pipes[name], [], "a", config, sizes).image.size

    assert size(CONFIG) == (96, 96)
    assert size(CONFIG, Sizes(resolution=100)) == (96, 96)
    assert size(CONFIG.model_copy(update={"width": 48, "height": 112})) == (48, 112)
    with pytest.raises(ConfigError, match="multiples of 16") as caught:
        size(CONFIG.model_copy(update={"width": 50, "height": 7}))
    assert "generate.width: found 50; the nearest is 48" in str(caught.value)
    assert "generate.height: found 7; the nearest is 16" in str(caught.value)


def test_a_size_asked_for_holds_with_a_reference_too(pipes: dict[str, Any], picture: Image.Image) -> None:
    config = CONFIG.model_copy(update={"width": 64, "height": 48})
    assert generate(pipes["flux-kontext"], [picture], "a", config, SIZES).image.size == (64, 48)


def test_one_side_alone_is_an_error() -> None:
    with pytest.raises(ConfigError, match="width is given without height"):
        check_config({"model": {"path": "bundled"}, "data": {"path": "x"}, "generate": {"width": 64}})


def test_references_that_a_pipeline_does_not_take(pipes: dict[str, Any], picture: Image.Image) -> None:
    with pytest.raises(ConfigError, match="FluxKontextPipeline takes one reference picture, found 2"):
        generate(pipes["flux-kontext"], [picture] * 2, "a", CONFIG, SIZES)
    with pytest.raises(ConfigError, match="FluxPipeline takes no reference pictures, found 1"):
        generate(pipes["flux"], [picture], "a", CONFIG, SIZES)
    with pytest.raises(ConfigError, match="QwenImageEditPlusPipeline edits pictures, found none"):
        generate(tiny_pipeline("qwen-image-edit-plus"), [], "a", CONFIG, SIZES)


@pytest.mark.parametrize("name", NAMES)
def test_cached_prompts_make_the_same_picture_without_text_encoders(
    pipes: dict[str, Any], picture: Image.Image, name: str, tmp_path: Path
) -> None:
    family, pipe = get_family(name), tiny_pipeline(name)
    images = [picture] if name == "flux-kontext" else []
    expected = generate(pipe, images, "make it red", CONFIG, SIZES)
    file = tmp_path / "a.png"
    picture.save(file)
    sample = Sample("a", file, (file,) * len(images), "make it red", (64, 64))
    embeds: dict[str, torch.Tensor] = {}
    for encoder in ("text_encoder", "text_encoder_2"):
        [tensors] = family.encode(pipe, encoder, [sample], SIZES)
        embeds |= {key: one.unsqueeze(0) for key, one in tensors.items() if not key.startswith("empty")}
        setattr(pipe, encoder, None)
    found = generate(pipe, images, "not read", CONFIG, SIZES, prompt_embeds=embeds)
    assert pixels(found.image) == pixels(expected.image)
