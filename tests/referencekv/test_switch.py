"""The cache as a switch on a stock pipeline: for one call or for all, and back to what was set before."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from tests.denoising import EDIT, equal, fail_in, qwen_transformer, velocities
from tests.referencekv.cached_steps import FROZEN, STEPS, edited

from dittocache import (
    Omni,
    OmniDiffusionConfig,
    ReferenceKVConfig,
    TeaCacheAdapter,
    TeaCacheConfig,
    cached,
    clear_image_token_caches,
    disable_image_kv_cache,
    enable_image_kv_cache,
    set_image_token_cache_enabled,
)
from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.families.denoiser import installed_hook
from dittocache.referencekv.hook import HOOK_NAME
from dittocache.referencekv.switch import SESSION_HOOK, STEP_CACHE_HOOK
from dittocache.sampling import session
from dittocache.teacache import hook as teacache_hook


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny_pipeline("qwen-image-edit-plus")


@pytest.fixture
def pipe(stock: Any) -> Iterator[Any]:
    yield stock
    disable_image_kv_cache(stock)
    assert type(stock) is QwenImageEditPlusPipeline


def latents(pipe: Any, tokens: list[int] | None = None, **call: Any) -> torch.Tensor:
    """What a call makes; `tokens` takes the number of image tokens of each step."""
    seen = tokens if tokens is not None else []
    first = pipe.transformer.transformer_blocks[0]
    handle = first.img_mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        return edited(pipe, **call)
    finally:
        handle.remove()


def kept_steps(tokens: list[int]) -> str:
    return "".join("c" if count < max(tokens) else "F" for count in tokens)


def hook_of(pipe: Any) -> Any:
    return installed_hook(pipe.transformer, HOOK_NAME)


def test_the_argument_counts_for_one_call(pipe: Any) -> None:
    plain = latents(pipe)
    enable_image_kv_cache(pipe, FROZEN)
    before: list[int] = []
    assert torch.equal(latents(pipe, before), plain)
    during: list[int] = []
    found = latents(pipe, during, use_image_kv_cache=True)
    after: list[int] = []
    assert torch.equal(latents(pipe, after), plain)
    assert (kept_steps(during), max(before)) == ("Fccc", max(during))
    assert len(set(before)) == len(set(after)) == 1
    assert not torch.equal(found, plain)
    assert hook_of(pipe) is None


def test_the_setting_of_before_is_back_and_nothing_is_kept(pipe: Any) -> None:
    plain = latents(pipe)
    enable_image_kv_cache(pipe, FROZEN)
    set_image_token_cache_enabled(pipe, True)
    tokens: list[int] = []
    cached_once = latents(pipe, tokens)
    assert kept_steps(tokens) == "Fccc"
    assert hook_of(pipe).bytes_held == 0
    assert torch.equal(latents(pipe, use_image_kv_cache=False), plain)
    assert hook_of(pipe).enabled and hook_of(pipe).bytes_held == 0
    assert torch.equal(latents(pipe), cached_once)
    set_image_token_cache_enabled(pipe, False)
    assert hook_of(pipe) is None
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("on_before", [False, True])
def test_a_call_that_is_broken_off_leaves_the_setting_and_no_keys(
    pipe: Any, on_before: bool, error: type[BaseException]
) -> None:
    enable_image_kv_cache(pipe, FROZEN)
    set_image_token_cache_enabled(pipe, on_before)

    def stop(_: Any, step: int, *rest: Any) -> Any:
        if step == 1:
            raise error("injected")
        return {}

    with pytest.raises(error, match="injected"):
        latents(pipe, use_image_kv_cache=not on_before, callback_on_step_end=stop)
    assert (hook_of(pipe) is not None and hook_of(pipe).enabled) == on_before
    with pytest.raises(error, match="injected"):
        latents(pipe, use_image_kv_cache=True, callback_on_step_end=stop)
    assert (hook_of(pipe) is None) or hook_of(pipe).bytes_held == 0


def test_the_pipeline_goes_by_its_own_name(pipe: Any) -> None:
    stock_signature = inspect.signature(QwenImageEditPlusPipeline.__call__)
    assert enable_image_kv_cache(enable_image_kv_cache(pipe, FROZEN)) is pipe
    assert isinstance(pipe, QwenImageEditPlusPipeline)
    assert type(pipe).__name__ == "QwenImageEditPlusPipeline"
    assert type(pipe).__module__ == QwenImageEditPlusPipeline.__module__
    signature = inspect.signature(type(pipe).__call__)
    assert set(signature.parameters) == {*stock_signature.parameters, "use_image_kv_cache"}
    with pytest.raises(TypeError, match="unexpected"):
        latents(pipe, use_imagekv_cache=True)


def test_clearing_in_the_middle_of_a_run_computes_anew() -> None:
    model = qwen_transformer()
    set_image_token_cache_enabled(model, True, FROZEN)
    first = velocities(model, EDIT, STEPS)
    hook = installed_hook(model, HOOK_NAME)
    velocities(model, EDIT, STEPS, stop=2)
    assert hook.bytes_held > 0
    clear_image_token_caches(model)
    assert hook.bytes_held == 0
    assert equal(velocities(model, EDIT, STEPS), first)
    with pytest.raises(ReferenceCacheError, match="on with other settings"):
        set_image_token_cache_enabled(model, True, ReferenceKVConfig(refresh=2))
    set_image_token_cache_enabled(model, False)
    clear_image_token_caches(model)  # nothing is kept: nothing to do
    assert equal(velocities(model, EDIT, STEPS), velocities(qwen_transformer(), EDIT, STEPS))


def test_within_a_session_it_is_paused_and_goes_on() -> None:
    model = qwen_transformer()
    plain = velocities(model, EDIT, STEPS)
    with cached(model, reference_kv=FROZEN) as trace:
        set_image_token_cache_enabled(model, False)
        assert equal(velocities(model, EDIT, STEPS), plain)
        set_image_token_cache_enabled(model, True)
        velocities(model, EDIT, STEPS)
    assert [step.references for step in trace.steps] == [None] * STEPS + ["computed"] + ["reused"] * (STEPS - 1)
    assert installed_hook(model, HOOK_NAME) is None


def test_within_a_session_or_a_step_cache_it_comes_too_late() -> None:
    model, settings = qwen_transformer(), TeaCacheConfig(num_inference_steps=STEPS)
    assert (SESSION_HOOK, STEP_CACHE_HOOK) == (session.HOOK_NAME, teacache_hook.HOOK_NAME)
    with cached(model, settings), pytest.raises(ReferenceCacheError, match=r"give both to one cached\("):
        set_image_token_cache_enabled(model, True)
    adapter = TeaCacheAdapter(settings)
    adapter.apply(model)
    with pytest.raises(ReferenceCacheError, match="turn the reference cache on before"):
        set_image_token_cache_enabled(model, True)
    adapter.remove(model)


def test_a_block_that_fails_leaves_nothing(pipe: Any) -> None:
    enable_image_kv_cache(pipe, FROZEN)
    set_image_token_cache_enabled(pipe, True)
    handle = fail_in(pipe.transformer.transformer_blocks[-1])
    with pytest.raises(RuntimeError, match="injected"):
        latents(pipe)
    handle.remove()
    assert hook_of(pipe).bytes_held == 0


def test_only_a_pipeline_has_calls_with_arguments() -> None:
    with pytest.raises(ModelError, match="argument of a pipeline's call"):
        enable_image_kv_cache(qwen_transformer())


def test_the_configuration_guides_entry_point_has_it_too(pipe: Any) -> None:
    omni = Omni(OmniDiffusionConfig(model="unused", use_image_kv_cache=True, reference_kv=FROZEN), pipe)
    for wanted, reused in ((None, STEPS - 1), (False, 0), (True, STEPS - 1)):
        latents_of_omni = {"use_image_kv_cache": wanted}
        latents(_Calls(omni, latents_of_omni))
        assert omni.trace.references_reused == reused


class _Calls:
    """`Omni.generate` with the pipeline's attributes."""

    def __init__(self, omni: Omni, options: dict[str, Any]) -> None:
        self._omni = omni
        self._options = options
        self.transformer = omni.pipeline.transformer

    def __call__(self, **call: Any) -> Any:
        return self._omni.generate(**call, **self._options)
