"""Faults of published reference caches, each of which would fail one of these tests.

1. Waiting for `modulate_index`, so that nothing happens on models with a live t; one slot a block for all CFG branches;
   reads of the device at every step; stale hits for a new picture of the same size, another batch, a changed LoRA;
   references dropped from the keys.
2. The text's RoPE offset taken from the shapes of a cached step's tokens instead of those of all pictures.
3. One slot for all layers, so that every layer attends to layer 0's keys.
4. Residuals of a step cache over N + R tokens at one step and N at the next.
5. Keys that outlive a call that was broken off, or are half filled.
6. The address of the references taken for their identity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.denoising import EDIT, EDITS, DeviceReads, Pipeline, equal, fail_in, qwen_transformer, sigmas, velocities
from tests.referencekv.cached_steps import FROZEN, reference_kv, twice

from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

STEPS = 4
TWO = EDITS["two references"]
LINE = ReferenceKVConfig(refresh=2)
SKIPPING = TeaCacheConfig(
    rel_l1_thresh=1e6, coefficients=(1.0, 0.0), max_consecutive_skips=1, num_inference_steps=STEPS
)


def marks(trace: Any) -> str:
    """`c` computed, `r` computed with kept references, `.` skipped."""
    marks = ("." if step.decision == "skipped" else "r" if step.references == "reused" else "c" for step in trace.steps)
    return "".join(marks)


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_1_models_with_a_live_t_and_without_are_cached(zero_cond_t: bool) -> None:
    model = qwen_transformer(zero_cond_t)
    with cached(model, reference_kv=FROZEN) as trace:
        velocities(model, EDIT, STEPS)
    assert marks(trace) == "crrr"


def test_1_branches_keep_their_own_lines() -> None:
    both = replace(EDIT, branches=("cond", "uncond"))
    model = qwen_transformer()
    with reference_kv(model, LINE):
        together = velocities(model, both, STEPS)
    for branch in both.branches:
        alone = qwen_transformer()
        with reference_kv(alone, LINE):
            assert equal({branch: together[branch]}, velocities(alone, replace(EDIT, branches=(branch,)), STEPS))


def test_1_nothing_waits_for_the_device_but_the_meter_once_a_refresh() -> None:
    pipe = Pipeline(qwen_transformer(zero_cond_t=True))
    pipe.scheduler.set_timesteps(8)
    latents, reads = EDIT.latents(), []
    adaptive = ReferenceKVConfig(refresh="adaptive", drift_tolerance=1e-9)
    for config, expected in ((LINE, [0] * 8), (adaptive, [0, 0, *[1] * 6])):
        reads = []
        with reference_kv(pipe, config), torch.no_grad():
            pipe.scheduler.set_timesteps(8)
            for t in pipe.scheduler.timesteps:
                kwargs = EDIT.kwargs(latents, float(t) / 1000)
                with DeviceReads() as mode, pipe.transformer.cache_context("cond"):
                    output = pipe.transformer(**kwargs)[0]
                reads.append(mode.count)
                latents = pipe.scheduler.step(output[:, : EDIT.noise], t, latents)[0]
        assert reads == expected


@pytest.mark.parametrize("kind", ["picture", "batch", "adapter", "scale"])
def test_1_what_was_kept_for_something_else_is_never_read(kind: str) -> None:
    def lora(model: Any) -> Any:
        model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "one")
        return model

    torch.manual_seed(0)
    model = lora(qwen_transformer())
    other = {"picture": EDIT.with_seed(9), "batch": replace(EDIT, batch=2)}.get(kind, EDIT)
    outputs = []
    with reference_kv(model, FROZEN), torch.no_grad(), model.cache_context("cond"):
        for step, t in enumerate(sigmas(STEPS)):
            now = other if step >= 2 else EDIT
            if step == 2 and kind == "adapter":
                model.disable_adapters()
            if step == 2 and kind == "scale":
                for module in model.modules():
                    if hasattr(module, "scaling"):
                        module.scaling["one"] *= 2
            outputs.append(model(**now.kwargs(now.latents(), t))[0])
        full = model(**other.kwargs(other.latents(), 0.125))[0]
    assert [output.shape[1] == EDIT.noise for output in outputs] == [False, True, False, True]
    assert full.shape[1] == EDIT.noise


def test_1_and_3_a_cached_step_sees_all_references_and_each_layer_its_own() -> None:
    model = qwen_transformer()
    with torch.no_grad(), reference_kv(model, FROZEN):
        full, again = twice(model, TWO.kwargs(TWO.latents(), 0.75))
    torch.testing.assert_close(again, full[:, : TWO.noise], rtol=1e-4, atol=1e-5)


def test_2_positions_are_those_of_all_pictures_also_behind_a_line() -> None:
    # With one input for all steps K and V lie on a (flat) line, so that every step must come out as the first.
    model, outputs = qwen_transformer(zero_cond_t=False), []
    with torch.no_grad(), reference_kv(model, ReferenceKVConfig(refresh=(0, 1))):
        for step in range(3):
            with model.cache_context("cond", step_index=step, num_inference_steps=4):
                outputs.append(model(**TWO.kwargs(TWO.latents(), 0.75))[0][:, : TWO.noise])
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-4, atol=1e-5)


def test_4_a_skip_behind_a_full_step_and_one_behind_a_cached_step() -> None:
    model = qwen_transformer()
    with cached(model, SKIPPING.model_copy(update={"num_inference_steps": 8}), LINE) as trace:
        velocities(model, EDIT, 8)
    assert marks(trace) == "c.r.c.rc"  # refreshes count computed steps


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_5_nothing_outlives_a_step_that_was_broken_off(error: BaseException, step: int) -> None:
    model = qwen_transformer()

    def explode(*_: Any) -> None:
        raise error

    with reference_kv(model, LINE) as hook:
        velocities(model, EDIT, STEPS, stop=step)
        handle = model.transformer_blocks[1].register_forward_pre_hook(explode)
        with pytest.raises(type(error)), model.cache_context("cond"), torch.no_grad():
            model(**EDIT.kwargs(EDIT.latents(), sigmas(STEPS)[step]))
        handle.remove()
        assert hook.bytes_held == 0
        assert all(block.attn.processor.given is None for block in model.transformer_blocks)
        after = velocities(model, EDIT.with_seed(8), STEPS)
    fresh = qwen_transformer()
    with reference_kv(fresh, LINE):
        assert equal(after, velocities(fresh, EDIT.with_seed(8), STEPS))


def test_5_a_failure_outside_of_the_transformer_ends_with_the_next_run() -> None:
    model, handle = qwen_transformer(), None
    with reference_kv(model, FROZEN):
        velocities(model, EDIT, STEPS, stop=2)  # the loop around it failed; nobody tells the cache
        again = velocities(model, EDIT.with_seed(3), STEPS)
        handle = fail_in(model.proj_out)
        with pytest.raises(RuntimeError, match="injected"):
            velocities(model, EDIT, STEPS)
        handle.remove()
    fresh = qwen_transformer()
    with reference_kv(fresh, FROZEN):
        assert equal(again, velocities(fresh, EDIT.with_seed(3), STEPS))


def test_6_other_pictures_at_the_same_address_are_other_pictures() -> None:
    model, tokens, kinds = qwen_transformer(), None, []
    remarks: list[str] = []
    with cached(model, reference_kv=FROZEN) as trace, torch.no_grad():
        for step, t in enumerate(sigmas(STEPS)):
            kwargs = EDIT.kwargs(EDIT.latents(), t)
            if tokens is None:
                tokens = kwargs["hidden_states"]
            if step == 2:
                tokens[:, EDIT.noise :] = EDIT.with_seed(5).references()
            kwargs["hidden_states"] = tokens  # the same memory at every step
            kinds.append(model(**kwargs)[0].shape[1] == EDIT.noise)
    remarks = trace.notes
    assert kinds == [False, True, False, True]
    assert len(remarks) == 1 and "changed in the middle of a denoising run" in remarks[0]


def test_6_new_prompt_embeddings_at_every_step_that_somebody_holds_get_a_remark() -> None:
    model, held = qwen_transformer(), []
    with cached(model, reference_kv=FROZEN) as trace, torch.no_grad():
        for t in sigmas(8):
            kwargs = EDIT.kwargs(EDIT.latents(), t)
            held.append(kwargs["encoder_hidden_states"])
            with model.cache_context("cond"):
                model(**kwargs)
    reused = trace.references_reused
    assert reused >= 6 or any("dittocache.request" in note for note in trace.notes)
