"""What is particular to one model that is only sampled from: caches of its own, pictures beside the noise, lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.denoising import DeviceReads
from tests.sampled_models import (
    CHANNELS,
    MODELS,
    NOISE,
    flux2_kwargs,
    flux2_transformer,
    ids,
    latents,
    qwen21_kwargs,
    qwen21_transformer,
    random,
    z_image_kwargs,
    z_image_transformer,
)
from tests.teacache.sampled_runs import EXACT, PATTERN, SCHEDULE, SKIPPING, denoise, path, pattern

from dittocache.errors import StepCacheError
from dittocache.families.registry import step_adapter_of
from dittocache.families.run_clock import RunClock
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig


def own_cache_run(transformer: Any, kind: str, stop: int | None = None) -> list[torch.Tensor]:
    """A run with the model's own cache of references, as its pipeline drives it."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    found, cache = [], QwenImage21KVCache(3) if kind == "Qwen-Image 2.1" else None
    noise = NOISE[0] * NOISE[1]
    with torch.no_grad():
        for step, (now, sigma) in enumerate(list(path())[:stop]):
            mode = "extract" if step == 0 else "cached"
            if kind == "Qwen-Image 2.1":
                kwargs = {**qwen21_kwargs(now, sigma, "cond"), "kv_cache": cache, "kv_cache_mode": mode}
                found.append(transformer(**kwargs)[0][:, -noise:])
                continue
            kwargs = {**flux2_kwargs(now, sigma, "cond"), "kv_cache_mode": mode}
            if step == 0:
                kwargs["hidden_states"] = torch.cat([random(2, 1, 16, CHANNELS), now], dim=1)
                kwargs["img_ids"] = torch.cat([ids(10, 4, 4), ids(0, *NOISE)], dim=1)
                output, cache = transformer(**kwargs, num_ref_tokens=16)
            else:
                kwargs |= {"hidden_states": now, "img_ids": ids(0, *NOISE), "kv_cache": cache}
                output = transformer(**kwargs)[0]
            found.append(output)
    return found


OWN_CACHES = {"Qwen-Image 2.1": qwen21_transformer, "FLUX.2 klein": lambda: flux2_transformer(own_cache=True)}


@pytest.mark.parametrize("config", [SKIPPING, SCHEDULE], ids=["residual", "output"])
@pytest.mark.parametrize("kind", OWN_CACHES)
def test_skipped_steps_leave_the_models_own_cache_alone(kind: str, config: TeaCacheConfig) -> None:
    transformer = OWN_CACHES[kind]()
    stock = own_cache_run(transformer, kind)
    with cached(transformer, config) as trace:
        own_cache_run(transformer, kind, stop=3)
        found = own_cache_run(transformer, kind)
    steps = pattern(trace)[3:]
    assert steps == (PATTERN if config is SKIPPING else "cc..c..c")
    for step, ours, theirs in zip(steps, found, stock, strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs) == (step == "c")
    with cached(transformer, EXACT[0]):
        assert all(map(torch.equal, own_cache_run(transformer, kind), stock))


def test_a_step_that_fills_the_models_own_cache_is_never_skipped() -> None:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    transformer, cache = qwen21_transformer(), QwenImage21KVCache(3)
    with cached(transformer, SKIPPING) as trace, torch.no_grad():
        for step, (now, sigma) in enumerate(path()):
            kwargs = qwen21_kwargs(now, sigma, "cond")
            if step == 2:  # somebody wants the cache from here on
                kwargs |= {"kv_cache": cache, "kv_cache_mode": "extract"}
            transformer(**kwargs)
    assert pattern(trace)[:4] == "c.c."
    assert cache.get_layer(2).get()[0].shape[1] == 9 - 4 + 16


def test_flux2_counts_its_noise_once_a_run() -> None:
    transformer = flux2_transformer()
    adapter = step_adapter_of(transformer)
    assert adapter is not None
    kwargs = flux2_kwargs(latents(), 1.0, "cond")
    with DeviceReads() as reads:
        for _ in range(4):  # pipelines join the ids of noise and references anew at every step
            fresh = {**kwargs, "img_ids": kwargs["img_ids"].clone()}
            assert adapter.token_layout(transformer, fresh).noise == NOISE[0] * NOISE[1]
    assert reads.count == 1
    other = flux2_kwargs(latents(), 1.0, "cond")
    other["img_ids"] = torch.cat([ids(0, *NOISE)[:, :10], ids(10, 6, 5)], dim=1)
    assert adapter.token_layout(transformer, other).noise == 10


def test_flux2_by_hand_may_have_another_share_of_references_with_the_same_prompt() -> None:
    transformer = flux2_transformer()
    clock = RunClock(step_adapter_of(transformer), num_inference_steps=2)
    first = flux2_kwargs(latents(), 1.0, "cond")
    tokens = first["img_ids"].shape[1]
    fewer = torch.cat([ids(0, *NOISE)[:, :10], ids(10, 6, 5)], dim=1)
    fewer = torch.cat([fewer, ids(20, 1, tokens)], dim=1)[:, :tokens]
    found = []
    for img_ids in (first["img_ids"], fewer):
        for sigma in (1.0, 0.5):  # the ids are put together anew at every step
            kwargs = {**first, "img_ids": img_ids.clone(), "timestep": torch.tensor([sigma])}
            with clock.call(transformer, None, kwargs) as call:
                assert call.layout is not None
                found.append((call.run, call.layout.noise, call.layout.reference))
    noise = NOISE[0] * NOISE[1]
    assert found == [(1, noise, tokens - noise)] * 2 + [(2, 10, tokens - 10)] * 2


def omni_kwargs(now: torch.Tensor, sigma: float) -> dict[str, Any]:
    plain = z_image_kwargs(now, sigma, "cond")
    return {
        **plain,
        "x": [[random(5, 4, 1, 8, 8), one] for one in plain["x"]],
        "cap_feats": [[one, random(6, 3, 12), random(7, 2, 12)] for one in plain["cap_feats"]],
        "siglip_feats": [[random(8, 4, 4, 12), None] for _ in plain["x"]],
        "image_noise_mask": [[0, 1] for _ in plain["x"]],
    }


def test_z_image_omni_is_predicted_by_its_output() -> None:
    transformer = z_image_transformer(omni=True)
    with torch.no_grad():
        stock = [transformer(**omni_kwargs(now, sigma))[0][0] for now, sigma in path()]
        with cached(transformer, SCHEDULE) as trace:
            found = [transformer(**omni_kwargs(now, sigma))[0][0] for now, sigma in path()]
    for step, ours, theirs in zip(pattern(trace), found, stock, strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs) == (step == "c")
    assert trace.skipped == 4
    with pytest.raises(StepCacheError, match="omni mode"), cached(transformer, SKIPPING), torch.no_grad():
        for now, sigma in path():
            transformer(**omni_kwargs(now, sigma))


def test_z_image_with_a_controlnet() -> None:
    transformer = z_image_transformer()
    adapter = step_adapter_of(transformer)
    assert adapter is not None
    kwargs = z_image_kwargs(latents(2), 0.5, "cond")
    residuals = {1: random(4, 2, 32 + 64, 32)}
    assert adapter.rows({**kwargs, "controlnet_block_samples": residuals}, [0]) is None  # prompts of two lengths
    model = MODELS["Z-Image"]
    extra = {"controlnet_block_samples": {1: random(4, 1, 32 + 32, 32)}}
    stock = denoise(transformer, model, **extra)
    with cached(transformer, SKIPPING) as trace:
        found = denoise(transformer, model, **extra)
    assert [torch.equal(*pair) for pair in zip(found, stock, strict=True)] == [one == "c" for one in PATTERN]
    assert pattern(trace) == PATTERN
    assert not torch.equal(stock[0], denoise(transformer, model)[0])


def test_pictures_of_several_sizes_in_one_batch_are_refused() -> None:
    transformer = z_image_transformer()
    for config, said in ((SKIPPING, "of one size"), (SCHEDULE, "samples of 2 shapes")):
        with pytest.raises(StepCacheError, match=said), cached(transformer, config), torch.no_grad():
            for now, sigma in path(2):
                kwargs = z_image_kwargs(now, sigma, "cond")
                kwargs["x"][1] = kwargs["x"][1][..., :8]
                transformer(**kwargs)
