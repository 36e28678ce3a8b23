"""Sessions: both caches together, on pipelines and bare transformers, and nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.denoising import EDIT, Pipeline, equal, fail_in, flux_transformer, qwen_transformer, sigmas, velocities

from dittocache.errors import ModelError, ReferenceCacheError, StepCacheError
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.prediction import BranchReferences
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

STEPS = 8
GUIDED = replace(EDIT, branches=("cond", "uncond"))
# Skips whatever it may: 0 c, 1-2 s, 3 c, 4-5 s, 6 c, 7 c.
SKIPPING = TeaCacheConfig(
    rel_l1_thresh=1e6, coefficients=(1.0, 0.0), max_consecutive_skips=2, num_inference_steps=STEPS
)
EXACT = TeaCacheConfig(rel_l1_thresh=0, num_inference_steps=STEPS)
EVERY_STEP = ReferenceKVConfig(refresh=1)


def marks(trace: Any, branch: str = "cond") -> str:
    """`c` computed, `r` computed with kept references, `.` skipped."""
    return "".join(
        "." if step.decision == "skipped" else "r" if step.references == "reused" else "c"
        for step in trace.steps
        if step.branch == branch
    )


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize(
    ("teacache", "reference_kv"), [(None, None), (EXACT, None), (None, EVERY_STEP), (EXACT, EVERY_STEP)]
)
def test_exact_settings_are_the_stock_model_bit_for_bit(teacache: Any, reference_kv: Any, zero_cond_t: bool) -> None:
    stock = velocities(qwen_transformer(zero_cond_t), GUIDED, STEPS, feed=True)
    model = qwen_transformer(zero_cond_t)
    with cached(model, teacache, reference_kv) as trace:
        assert equal(velocities(model, GUIDED, STEPS, feed=True), stock)
    assert (trace.computed, trace.skipped) == (2 * STEPS, 0)


def test_refreshes_count_computed_steps() -> None:
    model = qwen_transformer()
    with cached(model, SKIPPING, ReferenceKVConfig(refresh=2)) as trace:
        velocities(model, GUIDED, STEPS)
    assert marks(trace) == marks(trace, "uncond") == "c..r..cr"


def test_a_skipped_step_touches_no_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model, touched = qwen_transformer(), []

    def noted(name: str) -> Any:
        within = getattr(BranchReferences, name)

        def note(self: Any, block: int, *rest: Any) -> Any:
            touched.append((name, block))
            return within(self, block, *rest)

        return note

    for name in ("put", "take"):
        monkeypatch.setattr(BranchReferences, name, noted(name))
    with cached(model, SKIPPING, ReferenceKVConfig(refresh=(0,))) as trace:
        velocities(model, EDIT, STEPS)
    assert marks(trace) == "c..r..rr"
    assert touched == [(name, block) for name in ("put", "take", "take", "take") for block in range(3)]


def test_together_each_computed_step_is_what_the_reference_cache_alone_gives() -> None:
    alone_model, model = qwen_transformer(), qwen_transformer()
    with cached(alone_model, reference_kv=ReferenceKVConfig(refresh=(0,))):
        alone = velocities(alone_model, EDIT, STEPS)["cond"]
    with cached(model, SKIPPING, ReferenceKVConfig(refresh=(0,))) as trace:
        together = velocities(model, EDIT, STEPS)["cond"]
    same = "".join("c" if torch.equal(*pair) else "." for pair in zip(together, alone, strict=True))
    assert same == marks(trace).replace("r", "c") == "c..c..cc"


def test_residuals_of_full_and_cached_steps_have_one_shape() -> None:
    # A full step has N + R tokens in its blocks, a cached step N: a residual of either must fit the next skip.
    model = qwen_transformer(zero_cond_t=True)
    with cached(model, SKIPPING, ReferenceKVConfig(refresh=2)), torch.no_grad():
        outputs = [model(**EDIT.kwargs(EDIT.latents(), t))[0] for t in sigmas(STEPS)]
    noise, whole = EDIT.noise, EDIT.noise + EDIT.reference
    assert [output.shape[1] for output in outputs] == [whole, noise, noise, noise, noise, noise, whole, noise]


def test_the_trace() -> None:
    model = qwen_transformer()
    with cached(model, SKIPPING, ReferenceKVConfig(refresh=(0,))) as trace:
        velocities(model, GUIDED, STEPS)
        velocities(model, GUIDED, STEPS)
    assert len(trace.steps) == 4 * STEPS
    assert trace.computed + trace.skipped == 4 * STEPS
    assert [step.step for step in trace.steps if step.branch == "cond" and step.run == 2] == list(range(STEPS))
    assert {step.run for step in trace.steps} == {1, 2}
    first, second = trace.steps[0], trace.steps[2]
    assert (first.decision, first.cause, first.distance) == ("computed", "one of the first steps", None)
    assert (second.decision, second.references) == ("skipped", None)
    assert second.distance is not None and 0 < second.distance < 1
    assert all(step.seconds > 0 for step in trace.steps)
    kept = 2 * 3 * 2 * EDIT.reference * 32 * 4  # branches, blocks, K and V, tokens, width, float32
    residuals = 2 * EDIT.noise * 32 * 4
    signal = EDIT.noise * 32 * 4
    assert trace.bytes_held == kept + residuals + signal
    assert json.loads(json.dumps(trace.as_dict()))["skipped"] == trace.skipped
    summary = trace.summary()
    assert "run 1, cond: 8 steps, 4 computed, 4 skipped, 3 with kept references" in summary
    assert "[c..r..rr]" in summary
    assert trace.notes == []


def test_drift_and_work_stand_in_the_trace() -> None:
    model = qwen_transformer()
    with cached(model, SKIPPING, ReferenceKVConfig(refresh=2)) as trace:
        velocities(model, EDIT, STEPS)
    assert marks(trace) == "c..r..cr"
    assert [step.step for step in trace.steps if step.drift is not None] == [6]
    [drift] = [step.drift for step in trace.steps if step.drift is not None]
    assert 0 < drift < 2
    saved = EDIT.reference / (EDIT.text_tokens + EDIT.noise + EDIT.reference)
    assert trace.passes == pytest.approx(2 + 2 * (1 - saved))
    assert f"their keys had drifted by {drift:.1%}" in trace.summary()
    assert json.loads(json.dumps(trace.as_dict()))["steps"][6]["drift"] == drift


def test_remarks_stand_in_the_trace(caplog: pytest.LogCaptureFixture) -> None:
    model = qwen_transformer()
    with cached(model, SKIPPING.model_copy(update={"rel_l1_thresh": 1e-9})) as trace:
        velocities(model, EDIT, STEPS)
    [note] = trace.notes
    assert "skipped none of 8 calls" in note
    assert note in trace.summary() and note in caplog.text


def test_an_unused_session_says_so() -> None:
    with cached(qwen_transformer(), SKIPPING) as trace:
        pass
    assert trace.summary().startswith("the transformer was not called")


def state(model: Any) -> Any:
    hooks = [
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    return set(model.__dict__), [block.attn.processor for block in model.transformer_blocks], hooks


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_is_left_behind(broken: bool) -> None:
    model = qwen_transformer()
    before, stock = state(model), velocities(model, GUIDED, STEPS)
    if broken:
        handle = fail_in(model.transformer_blocks[2])
        with pytest.raises(RuntimeError, match="injected"), cached(model, SKIPPING, ReferenceKVConfig(refresh=(0,))):
            velocities(model, GUIDED, STEPS)
        handle.remove()
    else:
        with cached(model, SKIPPING, ReferenceKVConfig(refresh=(0,))):
            velocities(model, GUIDED, STEPS, stop=5)
    assert state(model) == before
    assert equal(velocities(model, GUIDED, STEPS), stock)


def test_an_exception_then_a_clean_run_in_one_session() -> None:
    model, fresh = qwen_transformer(), qwen_transformer()
    with cached(fresh, SKIPPING, ReferenceKVConfig(refresh=(0,))):
        expected = velocities(fresh, GUIDED.with_seed(3), STEPS)
    for stop in (0, 1, 4):
        with cached(model, SKIPPING, ReferenceKVConfig(refresh=(0,))) as trace:
            velocities(model, GUIDED, STEPS, stop=stop)
            handle = fail_in(model.proj_out)
            with pytest.raises(RuntimeError, match="injected"):
                velocities(model, GUIDED, STEPS)
            handle.remove()
            assert equal(velocities(model, GUIDED.with_seed(3), STEPS), expected)
        assert len({step.run for step in trace.steps}) == (2 if stop else 1)


def test_sessions_cannot_be_nested() -> None:
    model = qwen_transformer()
    before = state(model)
    with cached(model, SKIPPING):
        for again in ((SKIPPING, None), (None, EVERY_STEP), (None, None)):
            with pytest.raises(StepCacheError, match="cannot be nested"), cached(model, *again):
                pass
        with pytest.raises(StepCacheError, match="cannot be nested"), cached(Pipeline(model), SKIPPING):
            pass
    assert state(model) == before


def test_what_cannot_be_applied_leaves_nothing() -> None:
    model = qwen_transformer()
    before = state(model)
    with (
        pytest.raises(StepCacheError, match="Unknown model type"),
        cached(model, TeaCacheConfig(model_type="NoPipeline"), ReferenceKVConfig(refresh=(0,))),
    ):
        pass
    assert state(model) == before
    with pytest.raises(ReferenceCacheError, match="no family knows"), cached(torch.nn.Linear(1, 1), None, EVERY_STEP):
        pass
    with pytest.raises(ModelError, match="no transformer"), cached(object(), SKIPPING):
        pass


def test_a_text_to_image_model_with_the_reference_cache_is_an_error() -> None:
    model = flux_transformer()
    kwargs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 4, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 6),
        "timestep": torch.tensor([1.0]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    with (
        pytest.raises(ReferenceCacheError, match="no reference tokens"),
        cached(model, reference_kv=ReferenceKVConfig(refresh=(0,))),
    ):
        model(**kwargs)


def test_a_model_that_nobody_knows_can_be_timed() -> None:
    model = torch.nn.Linear(2, 2)
    with cached(model) as trace:
        model(torch.ones(1, 2))
    assert trace.computed == 1
