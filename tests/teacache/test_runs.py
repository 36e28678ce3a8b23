"""State belongs to one run: exceptions, interrupts, other sizes and other step counts leave nothing to the next."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.utils import set_weights_and_activate_adapters
from peft import LoraConfig
from tests.denoising import EDIT, Edit, Pipeline, counted, equal, fail_in, qwen_transformer, sigmas, velocities
from tests.teacache.skipped_steps import GUIDED, SKIPPED, SKIPPING, STEPS, run, teacache

from dittocache.families.run_clock import request
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.session import cached
from dittocache.teacache.hook import HOOK_NAME


def test_an_exception_in_the_middle_leaves_nothing_for_the_next_run() -> None:
    for step_of_failure in (1, 5):  # after a computed step, and within a later one
        model = qwen_transformer()
        with teacache(model, SKIPPING.model_copy(update={"max_consecutive_skips": 1})):
            config_run = velocities(model, EDIT, STEPS)
            velocities(model, EDIT, STEPS, stop=step_of_failure)
            fail_in(model.transformer_blocks[1])
            with pytest.raises(RuntimeError, match="injected"):
                velocities(model, EDIT.with_seed(7), STEPS)
            # Same timesteps, other pictures, no run in between that ended well.
            after = velocities(model, EDIT.with_seed(8), STEPS)
        fresh = run(SKIPPING.model_copy(update={"max_consecutive_skips": 1}), EDIT.with_seed(8))
        assert equal(after, fresh)
        assert not equal(after, config_run)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_within_a_step_leaves_nothing_for_the_next_run(interrupt: type[BaseException]) -> None:
    def strike(*_: Any) -> None:
        raise interrupt

    model = qwen_transformer()
    with teacache(model, SKIPPING) as hook, torch.no_grad():
        velocities(model, EDIT, STEPS, stop=4)
        handle = model.transformer_blocks[1].register_forward_pre_hook(strike)
        with pytest.raises(interrupt):
            model(**EDIT.kwargs(EDIT.latents(), sigmas(STEPS)[4]))  # a computed step
        handle.remove()
        assert hook.bytes_held == 0
        assert equal(velocities(model, EDIT.with_seed(8), STEPS), run(SKIPPING, EDIT.with_seed(8)))


def test_an_exception_frees_the_memory() -> None:
    model = qwen_transformer()
    with teacache(model, SKIPPING) as hook:
        velocities(model, EDIT, STEPS, stop=3)
        assert hook.bytes_held == 2 * EDIT.noise * 32 * 4  # one residual, one signal
        handle = fail_in(model.proj_out)
        with pytest.raises(RuntimeError, match="injected"), torch.no_grad():
            model(**EDIT.kwargs(EDIT.latents(), 0.1))
        assert hook.bytes_held == 0
        handle.remove()


OTHER_RUNS = {
    "the same again": EDIT,
    "other pictures of the same size": EDIT.with_seed(5),
    "another size": replace(EDIT, shapes=((1, 6, 4), (1, 6, 4))),
    "as many tokens, laid out otherwise": replace(EDIT, shapes=((1, 6, 4), (1, 4, 4))),
    "another batch size": replace(EDIT, batch=3),
    "guidance": GUIDED,
}


@pytest.mark.parametrize("other", OTHER_RUNS.values(), ids=OTHER_RUNS)
@pytest.mark.parametrize("stop", [None, 1, 3])  # 3: broken off at a skipped step, as by an interrupt
def test_a_run_behind_another_is_that_of_a_fresh_model(other: Edit, stop: int | None) -> None:
    model = qwen_transformer()
    with teacache(model, SKIPPING):
        velocities(model, EDIT, STEPS, stop=stop)
        after = velocities(model, other, STEPS)
    assert equal(after, run(SKIPPING, other))


def test_a_change_of_dtype_starts_anew() -> None:
    model, half = qwen_transformer(), replace(EDIT, dtype=torch.bfloat16)
    with teacache(model, SKIPPING):
        velocities(model, EDIT, STEPS, stop=3)
        model.to(torch.bfloat16)
        after = velocities(model, half, STEPS)
    fresh = qwen_transformer().to(torch.bfloat16)
    with teacache(fresh, SKIPPING):
        assert equal(after, velocities(fresh, half, STEPS))


def test_another_number_of_steps_is_read_from_the_scheduler() -> None:
    pipe = Pipeline(qwen_transformer())
    config = SKIPPING.model_copy(update={"num_inference_steps": None})
    patterns = []
    with teacache(pipe, config), torch.no_grad():
        for steps in (4, 6, 3):
            pipe.scheduler.set_timesteps(steps)
            latents, pattern = EDIT.latents(), ""
            for t in pipe.scheduler.timesteps:
                with counted(pipe.transformer.transformer_blocks[:1]) as ran:
                    output = pipe.transformer(**EDIT.kwargs(latents, float(t) / 1000))[0][:, : EDIT.noise]
                pattern += "c" if ran else "."
                latents = pipe.scheduler.step(output, t, latents)[0]
            patterns.append(pattern)
    assert patterns == ["c..c", "c...cc", "c.c"]


def alone(edit: Edit) -> list[torch.Tensor]:
    """What a fresh model gives for this edit."""
    model = qwen_transformer()
    with teacache(model, SKIPPING):
        return taking_turns(model, [edit])[0]


def taking_turns(model: Any, edits: list[Edit], names: list[str] | None = None) -> list[list[torch.Tensor]]:
    """Runs that take turns on one transformer, each with prompt embeddings that it holds for all its steps."""
    found: list[list[torch.Tensor]] = [[] for _ in edits]
    latents = [edit.latents() for edit in edits]
    texts = [edit.kwargs(latent, 1.0)["encoder_hidden_states"] for edit, latent in zip(edits, latents, strict=True)]
    with torch.no_grad():
        for t in sigmas(STEPS):
            for number, edit in enumerate(edits):
                kwargs = edit.kwargs(latents[number], t)
                if names is None:
                    kwargs["encoder_hidden_states"] = texts[number]
                with request(names[number]) if names else nullcontext():
                    velocity = model(**kwargs)[0][:, : edit.noise]
                found[number].append(velocity)
                latents[number] = latents[number] - velocity / STEPS
    return found


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_requests_that_take_turns_keep_apart(names: list[str] | None) -> None:
    edits = [EDIT, EDIT.with_seed(5), EDIT.with_seed(9)]
    model = qwen_transformer()
    with cached(model, SKIPPING) as trace:
        together = taking_turns(model, edits, names)
    assert trace.skipped == len(edits) * len(SKIPPED)
    for edit, velocities_found in zip(edits, together, strict=True):
        assert all(map(torch.equal, velocities_found, alone(edit)))


def test_references_of_requests_that_take_turns_keep_apart() -> None:
    edits = [EDIT, EDIT.with_seed(5)]
    model = qwen_transformer()
    with cached(model, None, ReferenceKVConfig(refresh=4)) as trace:
        together = taking_turns(model, edits)
    assert trace.references_reused == 2 * 6
    for edit, velocities_found in zip(edits, together, strict=True):
        fresh = qwen_transformer()
        with cached(fresh, None, ReferenceKVConfig(refresh=4)):
            assert all(map(torch.equal, velocities_found, taking_turns(fresh, [edit])[0]))


def test_broken_off_requests_do_not_pile_up() -> None:
    model = qwen_transformer()
    held = []
    with cached(model, SKIPPING), torch.no_grad():
        adapter_hook = model._diffusers_hook.get_hook(HOOK_NAME)
        for seed in range(20):
            kwargs = EDIT.with_seed(seed).kwargs(EDIT.with_seed(seed).latents(), 1.0)
            held.append(kwargs["encoder_hidden_states"])
            model(**kwargs)
        assert len(adapter_hook._runs) <= 8


@pytest.mark.parametrize("change", ["another LoRA", "its scale", "switched off"])
def test_a_change_of_the_lora_within_a_run_starts_anew(change: str) -> None:
    model = qwen_transformer()
    for name in ("one", "two"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
    model.set_adapter("one")
    with cached(model, SKIPPING) as trace, torch.no_grad():
        text = None
        for step, t in enumerate(sigmas(STEPS)):
            if step == 2:
                if change == "another LoRA":
                    model.set_adapter("two")
                elif change == "its scale":
                    set_weights_and_activate_adapters(model, ["one"], [0.5])
                else:
                    model.disable_adapters()
            kwargs = EDIT.kwargs(EDIT.latents(), t)
            text = kwargs["encoder_hidden_states"] if text is None else text
            model(**{**kwargs, "encoder_hidden_states": text})
    assert [record.decision for record in trace.steps[:4]] == ["computed", "skipped", "computed", "skipped"]
    assert [record.run for record in trace.steps[:4]] == [1, 1, 2, 2]
