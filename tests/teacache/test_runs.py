"""State belongs to one run: exceptions, interrupts, other sizes and other step counts leave nothing to the next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.denoising import EDIT, Edit, Pipeline, counted, equal, fail_in, qwen_transformer, velocities
from tests.teacache.skipped_steps import GUIDED, SKIPPING, STEPS, run, teacache


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
