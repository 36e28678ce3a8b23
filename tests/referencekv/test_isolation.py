"""Isolated references: what they see, that their keys and values stay the same, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.denoising import CHANNELS, EDIT, EDITS, Edit, equal, qwen_transformer, relative_error, velocities
from tests.referencekv.cached_steps import FROZEN, reference_kv
from tests.referencekv.dense_attention import DenseAttention

from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.families.denoiser import is_isolated
from dittocache.families.registry import adapter_of
from dittocache.referencekv.isolated_block import PASSING
from dittocache.referencekv.isolation import isolate_references
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

STEPS = 5
GUIDED = ("cond", "uncond")

every_edit = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
both_kinds = pytest.mark.parametrize("zero_cond_t", [False, True])

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def recorded(model: Any) -> Iterator[KeysAndValues]:
    """K and V of the references, block by block, of every call within."""
    found: KeysAndValues = []

    def keep(block: int, key: torch.Tensor, value: torch.Tensor, source: Any) -> None:
        found.append((key.detach().clone(), value.detach().clone()))

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["attention_kwargs"][PASSING].keep = keep

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def reference_keys(model: Any, kwargs: dict[str, Any]) -> KeysAndValues:
    with recorded(model) as found, torch.no_grad():
        model(**kwargs)
    assert len(found) == len(model.transformer_blocks)
    return found


def identical(one: KeysAndValues, other: KeysAndValues) -> bool:
    return all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))


@every_edit
@both_kinds
@torch.no_grad()
def test_it_is_the_model_with_a_mask_and_references_at_t_0(edit: Edit, zero_cond_t: bool) -> None:
    dense = qwen_transformer(zero_cond_t=True)
    adapter = adapter_of(dense)
    for block in dense.transformer_blocks:
        block.attn.set_processor(DenseAttention(adapter, [edit.reference]))
    model = qwen_transformer(zero_cond_t)
    isolate_references(model)
    for t in (1.0, 0.25):
        kwargs = edit.kwargs(edit.latents(), t)
        expected = dense(**kwargs)[0][:, : edit.noise]
        found = model(**kwargs)[0]
        assert found.shape == expected.shape
        assert relative_error(found, expected) < 1e-5
        stock = qwen_transformer(zero_cond_t)(**kwargs)[0][:, : edit.noise]
        assert relative_error(stock, expected) > 1e-2  # the mask matters


@every_edit
@both_kinds
def test_keys_and_values_follow_from_the_references_alone(edit: Edit, zero_cond_t: bool) -> None:
    model = qwen_transformer(zero_cond_t)
    isolate_references(model)
    first = reference_keys(model, edit.kwargs(edit.latents(), 1.0))
    noise, prompt = edit.with_seed(7).latents(), replace(edit, text_tokens=9).kwargs(edit.latents(), 0.5, "uncond")
    assert identical(first, reference_keys(model, edit.kwargs(edit.latents(), 0.125)))
    assert identical(first, reference_keys(model, edit.kwargs(noise, 1.0)))
    assert identical(first, reference_keys(model, prompt))
    other = reference_keys(model, edit.with_seed(7).kwargs(edit.latents(), 1.0))
    assert not any(
        torch.equal(one[place], two[place]) for one, two in zip(first, other, strict=True) for place in (0, 1)
    )


def test_references_of_a_sample_see_each_other() -> None:
    edit = EDITS["two references"]
    model = qwen_transformer()
    isolate_references(model)
    kwargs = edit.kwargs(edit.latents(), 1.0)
    before = reference_keys(model, kwargs)
    changed = dict(kwargs, hidden_states=kwargs["hidden_states"].clone())
    changed["hidden_states"][:, -1] += 1  # of the second reference
    after = reference_keys(model, changed)
    first = edit.shapes[1][1] * edit.shapes[1][2]
    assert torch.equal(before[0][0][:, :first], after[0][0][:, :first])  # nothing was seen before the first attention
    assert not torch.equal(before[1][0][:, :first], after[1][0][:, :first])


def test_keys_and_values_of_the_stock_model_move() -> None:
    # Else the tests above would show nothing.
    model, values = qwen_transformer(zero_cond_t=True), []
    handles = [
        block.attn.to_v.register_forward_hook(lambda *call: values.append(call[2][:, EDIT.noise :]))
        for block in model.transformer_blocks
    ]
    with torch.no_grad():
        for t in (1.0, 0.125):
            model(**EDIT.kwargs(EDIT.latents(), t))
    for handle in handles:
        handle.remove()
    assert [torch.equal(values[block], values[block + 3]) for block in range(3)] == [True, False, False]


@every_edit
@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_exact(edit: Edit, zero_cond_t: bool, dtype: torch.dtype) -> None:
    guided = replace(edit, branches=GUIDED, dtype=dtype)
    model = qwen_transformer(zero_cond_t).to(dtype)
    isolate_references(model)
    uncached = velocities(model, guided, STEPS)
    with reference_kv(model) as hook:
        assert equal(velocities(model, guided, STEPS), uncached)
        assert hook.bytes_held == 2 * 2 * 3 * edit.batch * edit.reference * 32 * dtype.itemsize
    assert equal(velocities(model, guided, STEPS), uncached)


def test_a_cached_step_runs_text_and_noise_alone() -> None:
    model, lengths = qwen_transformer(), []
    isolate_references(model)
    for block in model.transformer_blocks:
        block.img_mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with reference_kv(model):
        velocities(model, EDIT, 3)
    assert lengths == [EDIT.reference, EDIT.noise] * 3 + [EDIT.noise] * 6


@both_kinds
def test_with_teacache_the_cache_of_references_changes_nothing(zero_cond_t: bool) -> None:
    skipping = TeaCacheConfig(rel_l1_thresh=0.5, coefficients=(1.0, 0.0), num_inference_steps=8)
    model = qwen_transformer(zero_cond_t)
    isolate_references(model)
    with cached(model, teacache=skipping) as alone:
        expected = velocities(model, EDIT, 8)
    with cached(model, teacache=skipping, reference_kv=FROZEN) as both:
        assert equal(velocities(model, EDIT, 8), expected)
    decisions = [step.decision for step in alone.steps]
    assert {"skipped", "computed"} == set(decisions)
    assert decisions == [step.decision for step in both.steps]
    assert [step.references for step in both.steps if step.decision == "computed"].count("computed") == 1


@both_kinds
def test_the_end_of_it_restores_the_stock_model(zero_cond_t: bool) -> None:
    model = qwen_transformer(zero_cond_t)
    processors = [block.attn.processor for block in model.transformer_blocks]
    stock = velocities(model, EDIT, STEPS)
    before = [set(part.__dict__) for part in model.modules()]
    with pytest.raises(RuntimeError, match="within"), isolate_references(model):
        assert is_isolated(model)
        assert adapter_of(model).reference_is_exact(model)
        assert not equal(velocities(model, EDIT, STEPS), stock)
        raise RuntimeError("within")
    assert not is_isolated(model)
    assert not adapter_of(model).reference_is_exact(model)
    assert model.zero_cond_t is zero_cond_t
    assert all(block.zero_cond_t is zero_cond_t for block in model.transformer_blocks)
    assert [block.attn.processor for block in model.transformer_blocks] == processors
    assert [set(part.__dict__) for part in model.modules()] == before
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert equal(velocities(model, EDIT, STEPS), stock)


def _with_lora(model: Any) -> Any:
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "img_mlp.net.2"]
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    return model


def _gradients(model: Any, edit: Edit) -> dict[str, torch.Tensor]:
    output = model(**edit.kwargs(edit.latents(), 0.5))[0]
    output.float().square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("edit", [EDITS["batch of 2"], EDITS["two references"]], ids=["batch of 2", "two references"])
def test_gradients_reach_the_lora_the_same_with_gradient_checkpointing(edit: Edit) -> None:
    model = _with_lora(qwen_transformer(zero_cond_t=True))
    isolate_references(model)
    plain = _gradients(model, edit)
    assert plain
    assert all(gradient is not None and bool(gradient.abs().max() > 0) for gradient in plain.values())
    model.enable_gradient_checkpointing()
    assert all(torch.equal(gradient, plain[name]) for name, gradient in _gradients(model, edit).items())


def test_gradients_pass_through_the_references_keys() -> None:
    # The first block's LoRA acts on the references too, whose keys and values later blocks attend to.
    model = _with_lora(qwen_transformer())
    isolate_references(model)
    kwargs = EDIT.kwargs(EDIT.latents(), 0.5)
    kwargs["hidden_states"].requires_grad_(True)
    model(**kwargs)[0].square().mean().backward()
    assert bool((kwargs["hidden_states"].grad[:, EDIT.noise :].abs().amax(dim=2) > 0).all())


def test_autocast_computes_in_16_bit_and_gradients_stay_in_32() -> None:
    model = _with_lora(qwen_transformer())
    isolate_references(model)
    exact = _gradients(model, EDIT)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**EDIT.kwargs(EDIT.latents(), 0.5))[0].dtype == torch.bfloat16
        rounded = _gradients(model, EDIT)
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, exact[name]) < 0.2


def test_a_lora_may_be_loaded_before_or_after() -> None:
    after, before = qwen_transformer(), _with_lora(qwen_transformer())
    isolate_references(after)
    _with_lora(after)
    isolate_references(before)
    assert equal(velocities(after, EDIT, 2), velocities(before, EDIT, 2))


def test_a_call_without_references_is_an_error() -> None:
    model = qwen_transformer()
    isolate_references(model)
    with pytest.raises(ReferenceCacheError, match="has none: 16 image tokens, all of them noise"):
        velocities(model, replace(EDIT, shapes=((1, 4, 4),)), 1)


def test_a_controlnet_is_an_error() -> None:
    model = qwen_transformer()
    isolate_references(model)
    residuals = {"controlnet_block_samples": [torch.zeros(1, EDIT.noise + EDIT.reference, 32)]}
    with pytest.raises(ReferenceCacheError, match="controlnet_block_samples would reach"):
        velocities(model, replace(EDIT, extra=residuals), 1)


def test_blocks_outside_of_the_transformers_call_are_an_error() -> None:
    model = qwen_transformer()
    isolate_references(model)
    with pytest.raises(ReferenceCacheError, match="outside of the transformer's own call"):
        model.forward(**EDIT.kwargs(EDIT.latents(), 1.0))


def test_a_processor_that_is_set_meanwhile_is_an_error() -> None:
    model = qwen_transformer()
    processor = model.transformer_blocks[1].attn.processor
    with isolate_references(model):
        model.transformer_blocks[1].attn.set_processor(processor)
        with pytest.raises(ReferenceCacheError, match="block 1 attends with QwenDouble"):
            velocities(model, EDIT, 1)
    assert model.transformer_blocks[1].attn.processor is processor


def test_what_cannot_be_isolated_is_an_error() -> None:
    model = qwen_transformer()
    with isolate_references(model), pytest.raises(ReferenceCacheError, match="isolated already"):
        isolate_references(model)
    with cached(model), pytest.raises(ReferenceCacheError, match="caches of dittocache are on"):
        isolate_references(model)
    isolation = isolate_references(model)
    with reference_kv(model), pytest.raises(ReferenceCacheError, match="cache is on for this transformer; remove it"):
        isolation.remove()
    isolation.remove()
    model.transformer_blocks[0].attn.set_processor(DenseAttention(adapter_of(model), [1]))
    with pytest.raises(ReferenceCacheError, match="block 0 .* attends with DenseAttention, but isolation of"):
        isolate_references(model)
    with pytest.raises(ReferenceCacheError, match="no family knows the transformer Linear"):
        isolate_references(torch.nn.Linear(1, CHANNELS))
    with pytest.raises(ModelError, match="no transformer in int"):
        isolate_references(3)


def test_the_cache_of_an_isolated_model_leaves_the_isolation_on() -> None:
    model = qwen_transformer()
    isolate_references(model)
    stand_ins = [block.attn.processor for block in model.transformer_blocks]
    with reference_kv(model):
        velocities(model, EDIT, 2)
    assert is_isolated(model)
    assert [block.attn.processor for block in model.transformer_blocks] == stand_ins
