"""The reference KV cache on stock transformers: where it is exact, and what must never be read again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from tests.denoising import (
    EDIT,
    EDITS,
    DeviceReads,
    Edit,
    Pipeline,
    counted,
    equal,
    fail_in,
    flux_transformer,
    qwen_transformer,
    relative_error,
    sigmas,
    velocities,
)
from tests.referencekv.cached_steps import FROZEN, reference_kv, twice

from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.hook import apply_reference_kv

STEPS = 5
GUIDED = replace(EDIT, branches=("cond", "uncond"))
EVERY_STEP = ReferenceKVConfig(refresh=1)


def run(config: ReferenceKVConfig, edit: Edit, zero_cond_t: bool = False) -> dict[str, list[torch.Tensor]]:
    """A run on a fresh model."""
    model = qwen_transformer(zero_cond_t)
    with reference_kv(model, config):
        return velocities(model, edit, STEPS)


every_edit = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
both_kinds = pytest.mark.parametrize("zero_cond_t", [False, True])


@every_edit
@both_kinds
def test_a_refresh_at_every_step_is_the_stock_model_bit_for_bit(edit: Edit, zero_cond_t: bool) -> None:
    guided = replace(edit, branches=("cond", "uncond"))
    assert equal(run(EVERY_STEP, guided, zero_cond_t), velocities(qwen_transformer(zero_cond_t), guided, STEPS))


@every_edit
@both_kinds
def test_the_step_that_fills_the_cache_is_the_stock_step_bit_for_bit(edit: Edit, zero_cond_t: bool) -> None:
    model = qwen_transformer(zero_cond_t)
    kwargs = edit.kwargs(edit.latents(), 0.75)
    with torch.no_grad():
        stock = model(**kwargs)[0]
        with reference_kv(model) as hook:
            assert torch.equal(model(**kwargs)[0], stock)  # all tokens
            assert hook.bytes_held > 0


@every_edit
@both_kinds
def test_a_cached_step_at_the_filling_steps_own_input_is_the_stock_step(edit: Edit, zero_cond_t: bool) -> None:
    # Nothing has changed since, so keys and values of every layer still fit: positions, modulation, masks and the
    # order of keys must all be right to come out where the stock step does.
    model = qwen_transformer(zero_cond_t)
    with torch.no_grad(), reference_kv(model):
        full, cached = twice(model, edit.kwargs(edit.latents(), 0.75))
    assert cached.shape[1] == edit.noise < full.shape[1]
    assert relative_error(cached, full[:, : edit.noise]) < 1e-5


def test_the_texts_positions_follow_from_all_pictures() -> None:
    # The reference is larger than the noise, and the text stands behind the largest picture: with the shapes of the
    # noise alone the text would move. The test above would notice; this one says that it matters.
    edit = EDITS["two references"]
    kwargs = edit.kwargs(edit.latents(), 0.75)
    model = qwen_transformer()
    _, all_text = model.pos_embed(kwargs["img_shapes"], max_txt_seq_len=5, device=torch.device("cpu"))
    noise_shapes = [[edit.shapes[0]]]
    _, noise_text = model.pos_embed(noise_shapes, max_txt_seq_len=5, device=torch.device("cpu"))
    assert not torch.equal(all_text, noise_text)


@both_kinds
def test_layer_0_is_exact_if_references_are_modulated_at_t_0(zero_cond_t: bool) -> None:
    errors = []
    for layers in (1, 3):
        stock = velocities(qwen_transformer(zero_cond_t, layers), EDIT, STEPS)["cond"]
        model = qwen_transformer(zero_cond_t, layers)
        with reference_kv(model):
            found = velocities(model, EDIT, STEPS)["cond"]
        assert torch.equal(found[0], stock[0])
        errors.append(min(relative_error(one, other) for one, other in zip(found[1:], stock[1:], strict=True)))
    one_layer, three_layers = errors
    assert three_layers > 1e-3  # approximate in the deeper layers of either kind
    assert (one_layer < 2e-5) == zero_cond_t
    assert one_layer < 2e-5 or one_layer > 1e-3


def test_branches_keep_their_own_keys_and_values() -> None:
    together = run(FROZEN, GUIDED)
    for branch in GUIDED.branches:
        assert equal({branch: together[branch]}, run(FROZEN, replace(GUIDED, branches=(branch,))))
    assert not torch.equal(together["cond"][2], together["uncond"][2])


def test_live_t_models_reuse_too() -> None:
    # An implementation that waits for modulate_index would do nothing on Edit and 2509.
    stock = velocities(qwen_transformer(False), EDIT, STEPS)["cond"]
    found = run(FROZEN, EDIT, zero_cond_t=False)["cond"]
    assert [torch.equal(*pair) for pair in zip(found, stock, strict=True)] == [True, False, False, False, False]


def test_every_block_runs_on_the_noise_tokens_only() -> None:
    model, lengths = qwen_transformer(), []
    for block in model.transformer_blocks:
        block.img_mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with reference_kv(model, ReferenceKVConfig(refresh=2)):
        velocities(model, EDIT, 4)
    whole = EDIT.noise + EDIT.reference
    assert lengths == [whole] * 3 + [EDIT.noise] * 3 + [whole] * 3 + [EDIT.noise] * 3


def test_refreshes_shrink_the_error() -> None:
    def error(refresh: Any) -> float:
        found = run(ReferenceKVConfig(refresh=refresh, extrapolate=False), EDIT)["cond"]
        return sum(relative_error(*pair) for pair in zip(found, stock, strict=True))

    stock = velocities(qwen_transformer(), EDIT, STEPS)["cond"]
    assert error((0,)) > 1.3 * error(2) > error(1) == 0


OTHER_RUNS = {
    "the same again": EDIT,
    "other pictures of the same size": EDIT.with_seed(5),
    "another size": replace(EDIT, shapes=((1, 6, 4), (1, 6, 4))),
    "as many tokens, laid out otherwise": replace(EDIT, shapes=((1, 6, 4), (1, 4, 4))),
    "as many tokens in references of another shape": replace(EDIT, shapes=((1, 4, 4), (1, 4, 6))),
    "another batch size": replace(EDIT, batch=3),
    "another text": replace(EDIT, text_tokens=7, masked=True),
    "guidance": GUIDED,
}


@pytest.mark.parametrize("other", OTHER_RUNS.values(), ids=OTHER_RUNS)
@pytest.mark.parametrize("stop", [None, 1, 3])
def test_a_run_behind_another_is_that_of_a_fresh_model(other: Edit, stop: int | None) -> None:
    model = qwen_transformer()
    with reference_kv(model):
        velocities(model, EDIT, STEPS, stop=stop)
        after = velocities(model, other, STEPS)
    assert equal(after, run(FROZEN, other))


def test_a_change_of_dtype_starts_anew() -> None:
    model, half = qwen_transformer(), replace(EDIT, dtype=torch.bfloat16)
    with reference_kv(model):
        velocities(model, EDIT, STEPS, stop=2)
        model.to(torch.bfloat16)
        after = velocities(model, half, STEPS)
    fresh = qwen_transformer().to(torch.bfloat16)
    with reference_kv(fresh):
        assert equal(after, velocities(fresh, half, STEPS))


@pytest.mark.parametrize("step", [0, 2])  # half filled, and while reading
@pytest.mark.parametrize("part", ["transformer_blocks.1", "transformer_blocks.2.attn.to_v", "proj_out"])
def test_an_exception_leaves_nothing_for_the_next_run(step: int, part: str) -> None:
    model = qwen_transformer()
    with reference_kv(model) as hook:
        velocities(model, EDIT, STEPS, stop=step)
        handle = fail_in(model.get_submodule(part))
        latents = EDIT.with_seed(7).latents()
        with pytest.raises(RuntimeError, match="injected"), model.cache_context("cond"), torch.no_grad():
            model(**EDIT.with_seed(7).kwargs(latents, sigmas(STEPS)[step]))
        assert hook.bytes_held == 0
        handle.remove()
        # The very step that failed comes again, then a whole run.
        with model.cache_context("cond"), torch.no_grad():
            again = model(**EDIT.kwargs(EDIT.latents(), sigmas(STEPS)[step]))[0]
        after = velocities(model, EDIT.with_seed(8), STEPS)
    with torch.no_grad():
        assert torch.equal(again, qwen_transformer()(**EDIT.kwargs(EDIT.latents(), sigmas(STEPS)[step]))[0])
    assert equal(after, run(FROZEN, EDIT.with_seed(8)))


def test_memory_is_counted_and_nothing_more_is_kept_alive() -> None:
    model = qwen_transformer()
    with reference_kv(model) as hook:
        velocities(model, GUIDED, STEPS)
        kept = [
            tensor for branch in hook._kept._branches.values() for block in range(3) for tensor in branch.take(block)
        ]
        assert hook.bytes_held == sum(tensor.untyped_storage().nbytes() for tensor in kept)
        assert hook.bytes_held == 2 * 3 * 2 * EDIT.reference * 32 * 4  # branches, blocks, K and V, tokens, width
        hook.reset_state(model)
        assert hook.bytes_held == 0
    with reference_kv(model, EVERY_STEP) as hook:
        velocities(model, GUIDED, STEPS)
        assert hook.bytes_held == 0  # nothing would ever be read


def test_with_a_pipeline_nothing_waits_for_the_device() -> None:
    pipe = Pipeline(qwen_transformer(zero_cond_t=True))
    pipe.scheduler.set_timesteps(STEPS)
    latents, edit = EDIT.latents(), EDITS["text mask"]
    reused = 0
    with reference_kv(pipe) as hook, torch.no_grad():
        for t in pipe.scheduler.timesteps:
            arguments = {branch: edit.kwargs(latents, float(t) / 1000, branch) for branch in ("cond", "uncond")}
            with DeviceReads() as mode:
                for branch, kwargs in arguments.items():
                    with pipe.transformer.cache_context(branch):
                        output = pipe.transformer(**kwargs)[0]
            assert mode.count == 0
            reused += output.shape[1] == edit.noise
            latents = pipe.scheduler.step(output[:, : edit.noise], t, latents)[0]
        assert hook.bytes_held > 0
    assert reused == STEPS - 1


def test_taken_off_the_stock_processors_are_back() -> None:
    model = qwen_transformer()
    processors = [block.attn.processor for block in model.transformer_blocks]
    before = set(model.__dict__)
    stock = velocities(copy.deepcopy(model), EDIT, STEPS)
    with pytest.raises(RuntimeError, match="in the session"), reference_kv(model):
        assert all(block.attn.processor not in processors for block in model.transformer_blocks)
        velocities(model, EDIT, STEPS, stop=2)
        raise RuntimeError("in the session")
    assert all(
        block.attn.processor is processor for block, processor in zip(model.transformer_blocks, processors, strict=True)
    )
    assert set(model.__dict__) == before
    assert not any(block._forward_pre_hooks for block in model.transformer_blocks)
    assert equal(velocities(copy.deepcopy(model), EDIT, STEPS), stock)


@pytest.fixture
def own_backend() -> Iterator[None]:
    """A model that is given an attention backend makes it the active one of the whole process."""
    with attention_backend():
        yield


@pytest.mark.usefixtures("own_backend")
def test_the_attention_backend_is_that_of_the_stock_processor() -> None:
    model = qwen_transformer()
    attention = model.transformer_blocks[0].attn
    stock = attention.processor
    with reference_kv(model):
        model.set_attention_backend("_native_math")
        assert stock._attention_backend is attention.processor._attention_backend is not None
        found = velocities(model, EDIT, STEPS)
    reference = qwen_transformer()
    reference.set_attention_backend("_native_math")
    with reference_kv(reference):
        assert equal(found, velocities(reference, EDIT, STEPS))


def test_a_run_without_references_is_an_error_not_a_no_op() -> None:
    model = qwen_transformer()
    text_to_image = replace(EDIT, shapes=((1, 4, 4),))
    with (
        reference_kv(model),
        pytest.raises(ReferenceCacheError, match="no reference tokens: 16 image tokens, all of them noise"),
    ):
        velocities(model, text_to_image, STEPS)


def test_a_model_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(ReferenceCacheError, match="no family knows the transformer Linear"):
        apply_reference_kv(torch.nn.Linear(1, 1), FROZEN)
    with pytest.raises(ModelError, match="no transformer in int"):
        apply_reference_kv(3, FROZEN)


def test_attention_that_is_computed_otherwise_is_an_error() -> None:
    class Mine(QwenDoubleStreamAttnProcessor2_0):
        pass

    model = qwen_transformer()
    model.transformer_blocks[1].attn.set_processor(Mine())
    with pytest.raises(ReferenceCacheError, match="block 1 of QwenImageTransformer2DModel attends with Mine"):
        apply_reference_kv(model, FROZEN)
    fused = flux_transformer()
    fused.fuse_qkv_projections()
    with pytest.raises(ReferenceCacheError, match="Fused|fused projections"):
        apply_reference_kv(fused, FROZEN)


def test_applied_twice_is_an_error() -> None:
    model = qwen_transformer()
    with reference_kv(model), pytest.raises(ReferenceCacheError, match="already"):
        apply_reference_kv(model, FROZEN)


def test_gradient_checkpointing_is_an_error_that_names_the_way_out() -> None:
    model = qwen_transformer().requires_grad_(True)
    model.enable_gradient_checkpointing()
    with reference_kv(model), torch.enable_grad():
        model(**EDIT.kwargs(EDIT.latents(), 0.75))
        with pytest.raises(ReferenceCacheError, match=r"torch\.no_grad"):
            model(**EDIT.kwargs(EDIT.latents(), 0.5))


def test_a_skipped_text_projection_is_none_of_its_business() -> None:
    # The text runs at every step, and every block once a call.
    model = qwen_transformer()
    with reference_kv(model), counted([model.txt_in, *model.transformer_blocks]) as ran:
        velocities(model, EDIT, 3)
    assert ran == ["Linear", *["QwenImageTransformerBlock"] * 3] * 3
