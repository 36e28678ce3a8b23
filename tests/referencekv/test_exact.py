"""Exact references: computed by themselves before the first step, shared by all that have the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.denoising import (
    EDIT,
    EDITS,
    DeviceReads,
    Edit,
    Pipeline,
    equal,
    fail_in,
    qwen_transformer,
    relative_error,
    velocities,
)
from tests.referencekv.cached_steps import reference_kv
from tests.referencekv.dense_attention import DenseAttention
from torch._dynamo.testing import CompileCounter

from dittocache.errors import ReferenceCacheError
from dittocache.families.registry import adapter_of
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.hook import apply_reference_kv
from dittocache.referencekv.isolation import isolate_references

STEPS = 4
GUIDED = ("cond", "uncond")
EXACT = ReferenceKVConfig(mode="exact")
ACROSS = ReferenceKVConfig(mode="exact", reuse_across_calls=True)
ONE_SET = 2 * 3 * EDIT.reference * 32 * 4  # K and V, blocks, tokens, width, float32

every_edit = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)


def isolated(apart: bool = False) -> Any:
    model = qwen_transformer(zero_cond_t=True)
    isolate_references(model, apart)
    return model


def lengths(model: Any) -> list[int]:
    """Image tokens of every call of a block from now on."""
    found: list[int] = []
    for block in model.transformer_blocks:
        block.img_mlp.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[1]))
    return found


@every_edit
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_is_uncached_bit_for_bit(edit: Edit, apart: bool, dtype: torch.dtype) -> None:
    guided = replace(edit, branches=GUIDED, dtype=dtype)
    model = isolated(apart).to(dtype)
    uncached = velocities(model, guided, STEPS)
    with reference_kv(model, EXACT):
        assert equal(velocities(model, guided, STEPS), uncached)


@pytest.mark.parametrize("storage", ["native", "modulated_input"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_it_stays_so_in_every_form_without_loss(storage: Any, offload: bool, apart: bool) -> None:
    edit = replace(EDITS["two references"], branches=GUIDED, batch=2)
    model = isolated(apart)
    uncached = velocities(model, edit, STEPS)
    with reference_kv(model, EXACT.model_copy(update={"storage": storage, "offload": offload})):
        assert equal(velocities(model, edit, STEPS), uncached)


def test_every_step_has_one_shape() -> None:
    model = isolated()
    found = lengths(model)
    with reference_kv(model, EXACT):
        velocities(model, EDIT, 3)
    assert found == [EDIT.reference] * 3 + [EDIT.noise] * 9


def test_references_apart_do_not_see_each_other() -> None:
    edit = EDITS["two references"]
    first = edit.shapes[1][1] * edit.shapes[1][2]
    kept = {}
    for apart in (False, True):
        model = isolated(apart)
        for changed in (False, True):
            kwargs = edit.kwargs(edit.latents(), 1.0)
            kwargs["hidden_states"][:, -1] += changed
            with reference_kv(model, EXACT) as hook, torch.no_grad():
                model(**kwargs)
                [branch] = hook._kept._sets
                kept[apart, changed] = branch.take(2)[0][:, :first].clone()
    assert torch.equal(kept[True, False], kept[True, True])
    assert not torch.equal(kept[False, False], kept[False, True])


def test_references_apart_are_the_model_with_a_mask_and_references_at_t_0() -> None:
    edit = EDITS["two references"]
    dense = qwen_transformer(zero_cond_t=True)
    processor = DenseAttention(adapter_of(dense), [48, 4])
    for block in dense.transformer_blocks:
        block.attn.set_processor(processor)
    found, together = velocities(isolated(apart=True), edit, 2), velocities(isolated(), edit, 2)
    for step, expected in enumerate(velocities(dense, edit, 2)["cond"]):
        assert relative_error(found["cond"][step], expected) < 1e-5 < relative_error(together["cond"][step], expected)


def test_one_reference_apart_is_one_reference() -> None:
    assert equal(velocities(isolated(apart=True), EDIT, STEPS), velocities(isolated(), EDIT, STEPS))


def test_branches_share_their_references_and_nothing_waits_for_the_device() -> None:
    pipe = Pipeline(isolated())
    found = lengths(pipe.transformer)
    pipe.scheduler.set_timesteps(STEPS)
    latents = EDIT.latents()
    with reference_kv(pipe, EXACT) as hook, torch.no_grad(), DeviceReads() as reads:
        for t in pipe.scheduler.timesteps.tolist():
            image = torch.cat([latents, EDIT.references()], dim=1)  # pipelines give both branches the same tensor
            for branch in GUIDED:
                with pipe.transformer.cache_context(branch):
                    kwargs = EDIT.kwargs(latents, t / 1000, branch) | {"hidden_states": image}
                    pipe.transformer(**kwargs)
            pipe.scheduler._step_index = (pipe.scheduler.step_index or 0) + 1
        assert hook.bytes_held == ONE_SET
    assert found.count(EDIT.reference) == 3
    assert reads.count == 0


def test_branches_with_other_references_do_not_share_them() -> None:
    model = isolated()
    latents, others = EDIT.latents(), EDIT.with_seed(9)

    def run() -> list[torch.Tensor]:
        found = []
        for t in (1.0, 0.5):
            for branch, edit in (("cond", EDIT), ("uncond", others)):
                with model.cache_context(branch), torch.no_grad():
                    found.append(model(**edit.kwargs(latents, t, branch))[0])
        return found

    uncached = run()
    with reference_kv(model, EXACT) as hook:
        assert all(map(torch.equal, run(), uncached))
        assert hook.bytes_held == 2 * ONE_SET


def test_references_that_change_within_a_run_are_computed_anew_for_their_branch_alone() -> None:
    model, latents = isolated(), EDIT.latents()
    edits = [(EDIT, EDIT), (EDIT.with_seed(9), EDIT), (EDIT.with_seed(9), EDIT)]

    def run() -> list[torch.Tensor]:
        found = []
        for step, pair in enumerate(edits):
            for branch, edit in zip(GUIDED, pair, strict=True):
                with model.cache_context(branch), torch.no_grad():
                    found.append(model(**edit.kwargs(latents, 1 - step / 4, branch))[0])
        return found

    uncached = run()
    with reference_kv(model, EXACT):
        assert all(map(torch.equal, run(), uncached))


def test_they_outlive_a_call_on_demand() -> None:
    model = isolated()
    other_prompt = replace(EDIT, text_tokens=9)
    expected = velocities(model, EDIT, STEPS), velocities(model, other_prompt, 2)
    for config, prefills in ((EXACT, 2), (ACROSS, 1)):
        with reference_kv(model, config) as hook:
            found = lengths(model)
            assert equal(velocities(model, EDIT, STEPS), expected[0])
            hook.reset_state(model)
            assert hook.bytes_held == (ONE_SET if config is ACROSS else 0)
            assert equal(velocities(model, other_prompt, 2), expected[1])
            assert found.count(EDIT.reference) == 3 * prefills
        assert hook.bytes_held == 0


def _other_content(model: Any) -> Edit:
    return EDIT.with_seed(5)


def _another_shape(model: Any) -> Edit:
    return replace(EDIT, shapes=((1, 4, 4), (1, 4, 6)))


def _another_batch(model: Any) -> Edit:
    return replace(EDIT, batch=2)


def _another_dtype(model: Any) -> Edit:
    model.to(torch.bfloat16)
    return replace(EDIT, dtype=torch.bfloat16)


def _a_lora(model: Any) -> Edit:
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    return EDIT


def _another_scale(model: Any) -> Edit:
    model.set_adapters(["default"], [0.5])
    return EDIT


def _other_weights(model: Any) -> Edit:
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_k.weight.mul_(1.5)
    return EDIT


def _attention_arguments(model: Any) -> Edit:
    return replace(EDIT, extra={"attention_kwargs": {"scale": 0.5}})


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (None, _other_content),
        (None, _another_shape),
        (None, _another_batch),
        (None, _another_dtype),
        (None, _a_lora),
        (_a_lora, _another_scale),
        (None, _other_weights),
        (_a_lora, _attention_arguments),
    ],
    ids=lambda change: getattr(change, "__name__", ""),
)
def test_nothing_stale_is_used_after(before: Any, change: Any) -> None:
    model = isolated()
    if before is not None:
        before(model)
    with reference_kv(model, ACROSS) as hook:
        velocities(model, EDIT, 2)
        hook.reset_state(model)
        edit = change(model)
        found = velocities(model, edit, 2)
        assert hook.bytes_held <= 2 * ONE_SET  # what no run uses is freed: a batch of 2 takes twice as much
    assert equal(found, velocities(model, edit, 2))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 2])
def test_an_exception_leaves_nothing_half_filled(error: Any, step: int) -> None:
    model = isolated()
    expected = velocities(model, EDIT, STEPS)
    with reference_kv(model, ACROSS) as hook:
        velocities(model, EDIT, STEPS, stop=step)

        def explode(*_: Any) -> None:
            raise error("injected")

        handle = model.transformer_blocks[1].register_forward_pre_hook(explode)
        with pytest.raises(error, match="injected"), model.cache_context("cond"), torch.no_grad():
            model(**EDIT.kwargs(EDIT.latents(), 1 - step / STEPS))
        assert hook.bytes_held == 0
        handle.remove()
        assert equal(velocities(model, EDIT, STEPS), expected)


def test_a_failure_behind_the_prefill_leaves_nothing() -> None:
    model = isolated()
    with reference_kv(model, EXACT) as hook:
        handle = fail_in(model.proj_out)
        with pytest.raises(RuntimeError, match="injected"):
            velocities(model, EDIT, 1)
        handle.remove()
        assert hook.bytes_held == 0


@pytest.mark.parametrize("config", [EXACT, ACROSS], ids=["each call", "across calls"])
def test_nothing_grows_over_50_calls(config: ReferenceKVConfig) -> None:
    model = isolated()
    sets = set()
    with reference_kv(model, config) as hook:
        for call in range(50):
            velocities(model, replace(EDIT, seed=call % 2, batch=1 + (call == 25)), 1)
            hook.reset_state(model)
            sets.add(len(hook._kept._sets))
            assert not hook._branches
            assert not hook._kept._branches
    assert sets == {1 if config is ACROSS else 0}
    assert hook.bytes_held == 0


def test_samples_with_references_of_other_sizes_cannot_be_told_apart() -> None:
    model = isolated(apart=True)
    edit = replace(EDITS["two references"], batch=2)
    kwargs = edit.kwargs(edit.latents(), 1.0)
    kwargs["img_shapes"] = [[(1, 4, 4), (1, 8, 8), (1, 2, 2)], kwargs["img_shapes"][1]]
    with pytest.raises(ReferenceCacheError, match="52 reference tokens do not divide into pictures of 64 and 4"):
        model(**kwargs)


def test_the_published_causal_checkpoint_in_its_own_class_is_pointed_to_the_stock_one() -> None:
    class QwenImageTransformerCausal2DModel(torch.nn.Module):
        pass

    with pytest.raises(ReferenceCacheError, match=r"by itself\. To use .* isolate_references\(pipe, apart=True\)"):
        apply_reference_kv(QwenImageTransformerCausal2DModel(), EXACT)


@pytest.fixture
def graphs() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled_first", [False, True])
def test_compiled_blocks_share_a_graph_of_references_and_one_of_steps(
    graphs: CompileCounter, compiled_first: bool
) -> None:
    plain = isolated()
    expected = velocities(plain, EDIT, STEPS)
    model = qwen_transformer(zero_cond_t=True) if compiled_first else isolated()
    for block in model.transformer_blocks:
        block.compile(backend=graphs, fullgraph=True)
    before = [block._compiled_call_impl for block in model.transformer_blocks]
    with isolate_references(model) if compiled_first else nullcontext():
        with reference_kv(model, EXACT):
            assert equal(velocities(model, EDIT, STEPS), expected)
            assert equal(velocities(model, EDIT, STEPS), expected)
        assert graphs.frame_count == 2
    if compiled_first:
        assert [block._compiled_call_impl for block in model.transformer_blocks] == before
