"""Pictures from real pipelines of random weights, with and without caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL import Image

from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import ConfigError, DataError, ReferenceCacheError
from dittocache.families.base import Sizes
from dittocache.families.qwen_image_sizes import output_size, pipeline_sizes
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.config import GenerateConfig
from dittocache.sampling.generate import generate
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

SIZES = Sizes(resolution=96, condition_resolution=64)
CONFIG = GenerateConfig(num_inference_steps=6, true_cfg_scale=2.0)
SKIPPING = TeaCacheConfig(rel_l1_thresh=1e6, coefficients=(1.0, 0.0), max_consecutive_skips=2)


@pytest.fixture(scope="module", params=[False, True], ids=["live t", "zero_cond_t"])
def edit_pipe(request: pytest.FixtureRequest) -> Any:
    return tiny_pipeline("qwen-image-edit-plus", zero_cond_t=request.param)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 96, 3), dtype=np.uint8)
    return [Image.fromarray(pixels[0]), Image.fromarray(pixels[1]).resize((64, 96))]


def pixels(image: Image.Image) -> Any:
    return np.asarray(image).tolist()


@pytest.mark.parametrize("count", [1, 2])
def test_exact_settings_are_the_stock_pipeline_bit_for_bit(edit_pipe: Any, pictures: Any, count: int) -> None:
    references = pictures[:count]
    width, height = output_size([picture.size for picture in references], SIZES)
    with pipeline_sizes(SIZES):
        stock = edit_pipe(
            image=references,
            prompt="make it red",
            negative_prompt=" ",
            true_cfg_scale=2.0,
            width=width,
            height=height,
            num_inference_steps=6,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    for teacache, reference_kv in (
        (None, None),
        (TeaCacheConfig(rel_l1_thresh=0), None),
        (None, ReferenceKVConfig(refresh=1)),
        (TeaCacheConfig(rel_l1_thresh=0), ReferenceKVConfig(refresh=1)),
    ):
        found = generate(edit_pipe, references, "make it red", CONFIG, SIZES, teacache, reference_kv)
        assert pixels(found.image) == pixels(stock)
        assert found.trace.computed == 12
        assert found.seconds > found.trace.seconds > 0


def test_caches_skip_and_reuse_in_a_pipeline(edit_pipe: Any, pictures: Any) -> None:
    stock = generate(edit_pipe, pictures, "make it red", CONFIG, SIZES)
    found = generate(edit_pipe, pictures, "make it red", CONFIG, SIZES, SKIPPING, ReferenceKVConfig(refresh=(0,)))
    again = generate(edit_pipe, pictures, "make it red", CONFIG, SIZES, SKIPPING, ReferenceKVConfig(refresh=(0,)))
    assert "[c..r.r]" in found.trace.summary()  # the last step is known from the scheduler
    assert found.trace.notes == []
    assert pixels(found.image) == pixels(again.image) != pixels(stock.image)
    other = generate(edit_pipe, pictures, "make it blue", CONFIG, SIZES, SKIPPING, ReferenceKVConfig(refresh=(0,)))
    assert pixels(other.image) != pixels(found.image)


def test_runs_in_a_session_do_not_know_of_each_other(edit_pipe: Any, pictures: Any) -> None:
    def call(index: int, **options: Any) -> Any:
        images = pictures[index : index + 1]
        width, height = output_size([images[0].size], SIZES)
        seed = torch.Generator().manual_seed(index)
        settings = {"num_inference_steps": 6, "true_cfg_scale": 1.0, **options}
        return edit_pipe(image=images, prompt="a", width=width, height=height, generator=seed, **settings).images[0]

    def stop_at_the_second_step(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        pipe._interrupt = step >= 1
        return kwargs

    def fresh(index: int, **options: Any) -> Any:
        with cached(edit_pipe, SKIPPING, ReferenceKVConfig(refresh=(0,))):
            return pixels(call(index, **options))

    with pipeline_sizes(SIZES):
        alone = [fresh(0), fresh(1), fresh(0, num_inference_steps=4)]
        with cached(edit_pipe, SKIPPING, ReferenceKVConfig(refresh=(0,))) as trace:
            call(0, callback_on_step_end=stop_at_the_second_step)
            assert pixels(call(1)) == alone[1]  # another size, behind an interrupt
            call(1, callback_on_step_end=stop_at_the_second_step)
            assert pixels(call(0)) == alone[0]
            assert pixels(call(0, num_inference_steps=4)) == alone[2]
            assert pixels(call(0)) == alone[0]
    assert len({step.run for step in trace.steps}) == 6


def test_sizes_are_restored_also_by_an_exception(edit_pipe: Any, pictures: Any) -> None:
    before = edit_plus.VAE_IMAGE_SIZE, edit_plus.CONDITION_IMAGE_SIZE
    with pytest.raises(KeyError, match="inside"), pipeline_sizes(SIZES):
        assert (edit_plus.VAE_IMAGE_SIZE, edit_plus.CONDITION_IMAGE_SIZE) == (96**2, 64**2)
        raise KeyError("inside")
    assert before == (edit_plus.VAE_IMAGE_SIZE, edit_plus.CONDITION_IMAGE_SIZE)
    generate(edit_pipe, pictures, "a", CONFIG.model_copy(update={"num_inference_steps": 2}), SIZES)
    assert before == (edit_plus.VAE_IMAGE_SIZE, edit_plus.CONDITION_IMAGE_SIZE)


def test_the_size_of_an_edit_is_the_pipelines_own() -> None:
    # The defaults of the real checkpoints: what the stock pipeline computes when no size is given.
    for picture in ((640, 480), (1000, 1000), (333, 777)):
        width, height = edit_plus.calculate_dimensions(1024 * 1024, picture[0] / picture[1])
        assert output_size([(8, 8), picture], Sizes()) == (width, height)
    assert output_size([], SIZES) == (96, 96)


@pytest.mark.parametrize("family", ["qwen-image", "flux"])
def test_text_to_image(family: str) -> None:
    pipe = tiny_pipeline(family)
    config = CONFIG.model_copy(update={"true_cfg_scale": 1.0})
    stock = generate(pipe, [], "a red circle", config, SIZES)
    exact = generate(pipe, [], "a red circle", config, SIZES, TeaCacheConfig(rel_l1_thresh=0))
    skipping = generate(pipe, [], "a red circle", config, SIZES, SKIPPING)
    assert stock.image.size == (96, 96)
    assert pixels(exact.image) == pixels(stock.image)
    assert "[c..c.c]" in skipping.trace.summary()
    with pytest.raises(ReferenceCacheError, match="no reference tokens"):
        generate(pipe, [], "a red circle", config, SIZES, reference_kv=ReferenceKVConfig(refresh=(0,)))


def test_references_from_files(edit_pipe: Any, pictures: Any, tmp_path: Path) -> None:
    pictures[0].save(tmp_path / "a.png")
    found = generate(edit_pipe, [tmp_path / "a.png"], "a", CONFIG, SIZES)
    assert pixels(found.image) == pixels(generate(edit_pipe, pictures[:1], "a", CONFIG, SIZES).image)
    with pytest.raises(DataError, match="none.png"):
        generate(edit_pipe, [tmp_path / "none.png"], "a", CONFIG, SIZES)


def test_what_a_pipeline_does_not_take_is_an_error(pictures: Any) -> None:
    with pytest.raises(ConfigError, match="QwenImagePipeline takes no reference pictures, found 2"):
        generate(tiny_pipeline("qwen-image"), pictures, "a", CONFIG, SIZES)
