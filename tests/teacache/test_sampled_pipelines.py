"""The step cache in the pipelines of diffusers for models that are only sampled from, called as users call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    QwenImage21Pipeline,
    ZImagePipeline,
)
from PIL import Image
from tests.sampled_models import TEXT_WIDTH, flux2_transformer, qwen21_transformer, random, z_image_transformer
from tests.teacache.sampled_runs import pattern

from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

STEPS = 8
SKIPPING = TeaCacheConfig(rel_l1_thresh=1e6, coefficients=(1.0, 0.0), max_consecutive_skips=3)
ERROR = TeaCacheConfig(gate="error", error_tolerance=1e6)
PATTERNS = {"residual": "c...c..c", "output": "ccc....c"}  # ccc: three steps to know the path


def scheduler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **settings)


class Processor:
    """As much of Qwen3-VL's as the pipeline looks at when it is made."""

    tokenizer = SimpleNamespace(encode=lambda text: [7])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[1, 2]]


def qwen21_pipe(references: int) -> Any:
    """Embeds prompts and pictures at random: pictures of 4 x 4 tokens take 4 places of the prompt."""
    pipe = QwenImage21Pipeline(scheduler(), None, None, Processor(), qwen21_transformer())
    pipe.latent_channels = 8

    def embed(prompt: list[str], image: Any, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = 5 + 4 * references
        pad = torch.zeros(len(prompt), places, dtype=torch.bool)
        pad[:, 2 : 2 + 4 * references] = True
        mask = torch.ones(len(prompt), places, dtype=torch.long)
        return torch.stack([random(len(one), places, TEXT_WIDTH) for one in prompt]), mask, pad

    pipe._get_qwen_prompt_embeds = embed
    pipe._encode_vae_image = lambda image, generator: random(9, 1, 8, 1, image.shape[-2] // 16, image.shape[-1] // 16)
    pipe.vae = SimpleNamespace(config=SimpleNamespace(z_dim=8))
    return pipe


def qwen21(references: int = 0, **call: Any) -> tuple[Any, dict[str, Any]]:
    call = {"prompt": ["a cat"], "height": 64, "width": 96, "output_resolution": 64, **call}
    if references:
        call["image"] = [Image.new("RGB", (64, 64), (200, 30 * number, 0)) for number in range(references)]
    return qwen21_pipe(references), call


def flux2(pipeline: Any, references: int = 0, **call: Any) -> tuple[Any, dict[str, Any]]:
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()
    transformer = flux2_transformer(guidance=pipeline is Flux2Pipeline)
    pipe = pipeline(scheduler=scheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    call = {"height": 64, "width": 96, "prompt_embeds": random(3, 1, 5, TEXT_WIDTH), **call}
    if references:
        call["image"] = [Image.new("RGB", (64, 64), (200, 30 * number, 0)) for number in range(references)]
    return pipe, call


def z_image(**call: Any) -> tuple[Any, dict[str, Any]]:
    pipe = ZImagePipeline(scheduler(), None, None, None, z_image_transformer())
    embeds = {"prompt_embeds": [random(3, 7, TEXT_WIDTH)], "negative_prompt_embeds": [random(4, 40, TEXT_WIDTH)]}
    return pipe, {"height": 64, "width": 96, **embeds, **call}


@dataclass(frozen=True)
class Case:
    """How to make the pipeline and its call, and how many calls of the transformer a step takes."""

    make: Callable[[], tuple[Any, dict[str, Any]]]
    calls: int = 1


GUIDED = {"negative_prompt": ["blurred"], "true_cfg_scale": 4.0}
CASES = {
    "Qwen-Image 2.1": Case(qwen21),
    "Qwen-Image 2.1, guided": Case(partial(qwen21, **GUIDED), 2),
    "Qwen-Image 2.1, two references, guided": Case(partial(qwen21, 2, **GUIDED), 2),
    "Qwen-Image 2.1, a reference, without its own cache": Case(partial(qwen21, 1, use_kv_cache=False)),
    "FLUX.2": Case(partial(flux2, Flux2Pipeline)),
    "FLUX.2, a reference": Case(partial(flux2, Flux2Pipeline, 1)),
    "FLUX.2 klein, two references, guided": Case(
        partial(flux2, Flux2KleinPipeline, 2, negative_prompt_embeds=random(5, 1, 5, TEXT_WIDTH)), 2
    ),
    "FLUX.2 klein KV": Case(partial(flux2, Flux2KleinKVPipeline)),
    "FLUX.2 klein KV, a reference": Case(partial(flux2, Flux2KleinKVPipeline, 1)),
    "Z-Image, guided": Case(z_image),
    "Z-Image, unguided": Case(partial(z_image, guidance_scale=0.0)),
    "Z-Image, two pictures": Case(partial(z_image, num_images_per_prompt=2)),
}


def made(pipe: Any, call: dict[str, Any], seed: int = 0, steps: int = STEPS) -> torch.Tensor:
    """The latents of one call, without the noise that they began with counted in."""
    generator = torch.Generator().manual_seed(seed)
    found = pipe(**call, num_inference_steps=steps, generator=generator, output_type="latent")[0]
    return torch.as_tensor(found)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("config", [TeaCacheConfig(rel_l1_thresh=0), TeaCacheConfig(gate="error", error_tolerance=0)])
def test_at_zero_the_picture_is_the_stock_one_bit_for_bit(case: Case, config: TeaCacheConfig) -> None:
    pipe, call = case.make()
    pipe.set_progress_bar_config(disable=True)
    stock = made(pipe, call)
    with cached(pipe, config) as trace:
        assert torch.equal(made(pipe, call), stock)
    assert (trace.computed, trace.skipped) == (STEPS * case.calls, 0)
    assert torch.equal(made(pipe, call), stock)


@pytest.mark.parametrize(("config", "kind"), [(SKIPPING, "residual"), (ERROR, "output")])
def test_steps_are_skipped_and_every_call_is_a_run_of_its_own(case: Case, config: TeaCacheConfig, kind: str) -> None:
    pipe, call = case.make()
    pipe.set_progress_bar_config(disable=True)
    stock = made(pipe, call)
    with cached(pipe, config) as trace:
        first = made(pipe, call)
        other = made(pipe, call, seed=1)
        again = made(pipe, call)
    assert pattern(trace) == 3 * "".join(one * case.calls for one in PATTERNS[kind])
    assert [record.step for record in trace.steps[:: case.calls]] == 3 * list(range(STEPS))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, stock)


def test_one_skipped_step_of_many_changes_the_picture_little(case: Case) -> None:
    pipe, call = case.make()
    pipe.set_progress_bar_config(disable=True)
    stock, errors = made(pipe, call, steps=16), []
    for prediction in ("residual", "output_linear"):
        schedule = tuple(step for step in range(16) if step != 8)
        config = TeaCacheConfig.model_validate({"gate": "schedule", "schedule": schedule, "prediction": prediction})
        with cached(pipe, config) as trace:
            errors.append(float((made(pipe, call, steps=16) - stock).norm() / stock.norm()))
        assert trace.skipped == case.calls
    assert 0 < min(errors) <= max(errors) < 0.2, errors


def test_klein_without_its_own_cache_makes_the_picture_of_a_pipeline_with_other_sizes_in_between() -> None:
    pipe, call = CASES["FLUX.2 klein KV, a reference"].make()
    pipe.set_progress_bar_config(disable=True)
    with cached(pipe, SKIPPING):
        alone = made(pipe, call)
    with cached(pipe, SKIPPING) as trace:
        made(pipe, {**call, "height": 96})
        made(pipe, {key: value for key, value in call.items() if key != "image"})
        assert torch.equal(made(pipe, call), alone)
    assert pattern(trace) == 3 * PATTERNS["residual"]


def test_z_image_whose_guidance_ends_early_starts_anew_there() -> None:
    pipe, call = z_image(cfg_truncation=0.5)
    pipe.set_progress_bar_config(disable=True)
    with cached(pipe, SKIPPING) as trace:
        made(pipe, call)
    rows = [record.rows for record in trace.steps]
    first = rows.index(1)  # the first step without guidance has nothing to predict from
    assert rows == [2] * first + [1] * (STEPS - first)
    assert trace.steps[first].decision == "computed"
    assert trace.skipped > 0
