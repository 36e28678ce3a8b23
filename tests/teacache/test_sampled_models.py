"""The step cache on transformers of models that are only sampled from: Qwen-Image 2.1, FLUX.2, Z-Image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.denoising import counted, sigmas
from tests.sampled_models import (
    MODELS,
    NOISE,
    Model,
    latents,
    picture,
    qwen21_kwargs,
    qwen21_transformer,
)
from tests.teacache.sampled_runs import EXACT, PATTERN, SCHEDULE, SKIPPING, STEPS, denoise, noise_of, path, pattern

from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.families.registry import adapter_of, step_adapter_of
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.outputs import sample_of

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@every_model
@pytest.mark.parametrize("config", EXACT, ids=["distance", "error"])
def test_at_zero_every_step_is_the_stock_one_bit_for_bit(model: Model, config: TeaCacheConfig) -> None:
    transformer = model.build()
    stock = denoise(transformer, model)
    with cached(transformer, config) as trace:
        found = denoise(transformer, model)
    assert all(map(torch.equal, found, stock))
    assert trace.skipped == 0


@every_model
def test_a_bare_transformers_run_is_told_by_its_timesteps(model: Model) -> None:
    transformer = model.build()
    with cached(transformer, SKIPPING) as trace:
        for seed in (1, 2, 2):
            denoise(transformer, model, seed=seed)
    assert pattern(trace) == 3 * PATTERN
    assert [record.run for record in trace.steps] == [1] * STEPS + [2] * STEPS + [3] * STEPS


@every_model
def test_computed_steps_are_stock_and_skipped_ones_take_the_residual(model: Model) -> None:
    transformer, adapter = model.build(), step_adapter_of(model.build())
    assert adapter is not None
    stock = denoise(transformer, model)
    with cached(transformer, SKIPPING) as trace:
        found = denoise(transformer, model)
    residual = None
    with torch.no_grad():
        for (now, sigma), step, ours, theirs in zip(path(), PATTERN, found, stock, strict=True):
            kwargs = model.kwargs(now, sigma)
            context = adapter.extract_context(transformer, **kwargs)
            context.validate()
            assert context.hidden_states.shape == context.modulated_input.shape == (1, NOISE[0] * NOISE[1], 32)
            if step == "c":
                assert torch.equal(ours, theirs)
                after = context.run_transformer_blocks()[0]
                residual = after - context.hidden_states
                torch.testing.assert_close(sample_of(context.postprocess(after)), theirs, rtol=1e-4, atol=1e-5)
            else:
                assert residual is not None
                expected = sample_of(context.postprocess(context.hidden_states + residual))
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
                assert (ours - theirs).norm() > 0.02 * theirs.norm()
    assert pattern(trace) == PATTERN


ATTENTION = {
    "Qwen-Image 2.1": "transformer_blocks.0.attn",
    "FLUX.2": "transformer_blocks.0.attn",
    "FLUX.2 klein": "transformer_blocks.0.attn",
    "Z-Image": "noise_refiner.0.attention",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_signal_is_what_the_first_block_attends_with(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]
    transformer, kwargs = model.build().to(dtype), model.kwargs(latents(2), 0.7)
    adapter = step_adapter_of(transformer)
    assert adapter is not None
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not key.endswith("_ids"):
            kwargs[key] = value.to(dtype)
        elif key in ("x", "cap_feats"):
            kwargs[key] = [one.to(dtype) for one in value]
    seen: list[torch.Tensor] = []

    def see(_: Any, args: Any, given: dict[str, Any]) -> None:
        seen.append(given["hidden_states"] if "hidden_states" in given else args[0])

    handle = transformer.get_submodule(ATTENTION[name]).register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        stock = transformer(**kwargs)
    handle.remove()
    layout = adapter.token_layout(transformer, kwargs)
    expected = adapter.noise_tokens(seen[0], layout, kwargs)
    with torch.no_grad():
        context = adapter.extract_context(transformer, **kwargs)
        again = context.postprocess(context.run_transformer_blocks()[0])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(context.modulated_input, expected, **tolerance)
    assert context.modulated_input.dtype == dtype
    torch.testing.assert_close(sample_of(again), noise_of(stock, layout, transformer, kwargs), **tolerance)


@every_model
def test_the_output_is_continued_in_sigma(model: Model) -> None:
    transformer = model.build()
    stock = denoise(transformer, model)
    with cached(transformer, SCHEDULE.model_copy(update={"prediction": "output_linear"})) as trace:
        found = denoise(transformer, model)
    assert pattern(trace) == "cc..c..c"
    for step, (now, before) in LINES.items():
        line = torch.lerp(stock[before], stock[now], (step - before) / (now - before))
        torch.testing.assert_close(found[step], line, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(found[step], stock[step]) for step in (0, 1, 4, 7))


LINES = {2: (1, 0), 3: (1, 0), 5: (4, 1), 6: (4, 1)}
"""Skipped steps of `SCHEDULE`, and the two computed ones before each."""


@pytest.mark.parametrize("name", MODELS)
def test_the_noise_is_continued_in_sigma_for_the_latents_as_they_are(name: str) -> None:
    transformer, model = MODELS[name].build(), MODELS[name]
    towards_noise = -1.0 if name == "Z-Image" else 1.0  # its pipeline negates what it returns
    stock = [towards_noise * one for one in denoise(transformer, model)]
    with cached(transformer, SCHEDULE) as trace:  # a schedule's prediction unless another is asked for
        found = [towards_noise * one for one in denoise(transformer, model)]
    assert pattern(trace) == "cc..c..c"
    seen = [torch.stack([picture(one) for one in now]) if name == "Z-Image" else now for now, _ in path()]
    levels = [sigma for _, sigma in path()]
    noise = [now + (1 - sigma) * one for now, sigma, one in zip(seen, levels, stock, strict=True)]
    for step, (now, before) in LINES.items():
        line = torch.lerp(noise[before], noise[now], (step - before) / (now - before))
        torch.testing.assert_close(found[step], (line - seen[step]) / (1 - levels[step]), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(found[step], stock[step]) for step in (0, 1, 4, 7))


@contextmanager
def all_that_run(transformer: Any) -> Iterator[list[str]]:
    ran: list[str] = []
    handles = [
        part.register_forward_pre_hook(lambda part, _, name=name: ran.append(name))
        for name, part in transformer.named_modules()
        if name
    ]
    yield ran
    for handle in handles:
        handle.remove()


@every_model
@pytest.mark.parametrize("config", [SKIPPING, SCHEDULE], ids=["residual", "output"])
def test_a_skipped_step_runs_nothing_that_it_does_not_need(model: Model, config: TeaCacheConfig) -> None:
    transformer = model.build()
    free = model.free if config is SKIPPING else frozenset()
    with cached(transformer, config) as trace, torch.no_grad():
        for now, sigma in path():
            with all_that_run(transformer) as ran:
                transformer(**model.kwargs(now, sigma))
            if trace.steps[-1].decision == "skipped":
                surplus = [name for name in ran if not any(f"{name}.".startswith(f"{one}.") for one in free)]
                assert surplus == []
    assert trace.skipped == (5 if config is SKIPPING else 4)


@every_model
def test_memory_is_that_of_the_noise_tokens(model: Model) -> None:
    transformer = model.build()
    with cached(transformer, SKIPPING) as trace:
        denoise(transformer, model)
    assert trace.bytes_held == 2 * NOISE[0] * NOISE[1] * 32 * 4  # a residual and a signal


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"Z-Image"}))  # whose pipelines put the branches into one batch
def test_branches_keep_apart_and_share_the_decision(name: str) -> None:
    model = MODELS[name]
    transformer = model.build()
    alone = []
    for branch in ("cond", "uncond"):
        with cached(transformer, SKIPPING):
            alone.append(denoise(transformer, model, (branch,)))
    with cached(transformer, SKIPPING) as trace:
        together = denoise(transformer, model, ("cond", "uncond"))
    assert pattern(trace) == "".join(2 * one for one in PATTERN)
    assert all(map(torch.equal, together[0::2], alone[0]))
    assert all(map(torch.equal, together[1::2], alone[1]))
    assert not torch.equal(together[0], together[1])


@every_model
def test_a_sample_that_need_not_run_is_left_out_of_the_batch(model: Model) -> None:
    transformer, adapter = model.build(), step_adapter_of(model.build())
    assert adapter is not None
    kwargs = model.kwargs(latents(3), 0.5)
    with torch.no_grad():
        whole = sample_of(transformer(**kwargs))
        part = adapter.rows(kwargs, [2, 0])
        assert part is not None
        torch.testing.assert_close(sample_of(transformer(**part)), whole[[2, 0]], rtol=1e-3, atol=1e-4)

    config = SKIPPING.model_copy(update={"rel_l1_thresh": 0.6, "max_consecutive_skips": 8})
    still, moving = latents(1), latents(1, 9)
    stock = []
    with torch.no_grad():
        for run in ("stock", "cached"):
            with cached(transformer, config) if run == "cached" else nullcontext() as trace:
                for step, sigma in enumerate(sigmas(STEPS)):
                    now = torch.cat([still, moving * (-1) ** step])
                    layout_kwargs = model.kwargs(now, sigma)
                    output = transformer(**layout_kwargs)
                    layout = adapter.token_layout(transformer, layout_kwargs)
                    sample = noise_of(output, layout, transformer, layout_kwargs)
                    if run == "stock":
                        stock.append(sample)
                        continue
                    assert trace is not None
                    record = trace.steps[-1]
                    if record.rows_computed == 1:
                        torch.testing.assert_close(sample[1], stock[step][1], rtol=1e-3, atol=1e-4)
                        assert not torch.allclose(sample[0], stock[step][0], rtol=1e-2)
    assert trace is not None
    assert sum(record.rows_computed == 1 for record in trace.steps) >= 3


@every_model
def test_the_scale_of_a_lora_counts_on_skipped_steps(model: Model) -> None:
    transformer = model.build()
    name = "joint_attention_kwargs" if "attention_kwargs" not in step_arguments(transformer) else "attention_kwargs"
    targets = ["proj_out", "img_in", "x_embedder", "all_x_embedder.2-1", "linear"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    found = {}
    for scale in (1.0, 0.25):
        with cached(transformer, SKIPPING):
            found[scale] = denoise(transformer, model, **{name: {"scale": scale}})
    assert all(not torch.allclose(one, other) for one, other in zip(found[1.0], found[0.25], strict=True))
    transformer.set_adapters("default", 0.25)
    with cached(transformer, SKIPPING):
        weighted = denoise(transformer, model)
    for one, other in zip(found[0.25], weighted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def step_arguments(transformer: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(transformer).forward).parameters)


@every_model
def test_why_there_is_no_reference_cache_is_said(model: Model) -> None:
    transformer = model.build()
    with pytest.raises(ModelError, match=f"no reference KV cache for {type(transformer).__name__}: .*step cache works"):
        adapter_of(transformer)
    with (
        pytest.raises(ReferenceCacheError, match="no reference KV cache"),
        cached(transformer, SKIPPING, ReferenceKVConfig(refresh=4)),
    ):
        pass
    assert not hasattr(transformer, "_diffusers_hook") or not transformer._diffusers_hook.hooks


@pytest.mark.parametrize("return_dict", [False, True])
@every_model
def test_a_skipped_step_returns_what_a_computed_one_does(model: Model, return_dict: bool) -> None:
    transformer = model.build()
    for config in (SKIPPING, SCHEDULE):
        with cached(transformer, config), torch.no_grad():
            kinds = [transformer(**{**model.kwargs(now, sigma), "return_dict": return_dict}) for now, sigma in path()]
        assert len({type(one) for one in kinds}) == 1
        assert len({type(one[0]) for one in kinds}) == 1


def test_a_transformers_first_block_is_counted() -> None:
    """The other tests' way of counting sees what runs."""
    transformer = qwen21_transformer()
    with counted(transformer.transformer_blocks) as ran, torch.no_grad():
        transformer(**qwen21_kwargs(latents(), 1.0, "cond"))
    assert len(ran) == 3
