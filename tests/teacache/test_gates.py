"""Gates and predictions beyond the spec's: known arithmetic, rows of a batch, one read a computed step."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.denoising import EDIT, EDITS, DeviceReads, Edit, Pipeline, counted, qwen_transformer, sigmas, velocities
from tests.teacache.skipped_steps import GUIDED, STEPS, run, teacache

from dittocache.errors import StepCacheError
from dittocache.families.transformer_side import CacheContext
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.error_policy import ErrorPolicy, ErrorState, after_computed, decide_by_error
from dittocache.teacache.prediction import Prediction, StackPass

# Random weights bend the path far more than trained ones.
ERROR = TeaCacheConfig(gate="error", error_tolerance=0.5, num_inference_steps=STEPS)


def _no_context() -> CacheContext:
    raise AssertionError("an output is predicted without the model")


@pytest.mark.parametrize("rows", [[0, 1, 2], [1]])
def test_a_line_in_sigma_is_continued_exactly(rows: list[int]) -> None:
    prediction = Prediction("output", 1)
    slope, start = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    line = lambda sigma: start + slope * sigma  # noqa: E731
    passed = StackPass(torch.zeros(3, 4, 2), torch.zeros(3, 4, 2))
    for sigma in (1.0, 0.9):
        prediction.observe(prediction.value(passed, (line(sigma),)), sigma, (line(sigma),), range(3))
    prediction.observe(line(0.6)[rows], 0.6, (line(0.6)[rows],), rows)  # some rows have a step more behind them
    (found,) = prediction.predict(0.25, _no_context)
    torch.testing.assert_close(found, line(0.25), rtol=1e-4, atol=1e-5)
    defect = prediction.defect(2 * line(0.25), 0.25, [0, 1, 2])
    assert defect is not None and defect.tolist() == pytest.approx([0.5] * 3, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_line_of_the_noise_answers_to_the_latents_as_they_are(dtype: torch.dtype) -> None:
    prediction = Prediction("noise", 1)
    passed = StackPass(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3))
    slope, start, latents = (torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3))
    velocity = lambda sigma, x: (start + slope * sigma - x) / (1 - sigma)  # noqa: E731
    for sigma in (0.9, 0.8):
        x = (latents * sigma).to(dtype)
        output = (velocity(sigma, x).to(dtype),)
        prediction.observe(prediction.value(passed, output, sigma, lambda x=x: x), sigma, output, range(2))
    for now in (latents, latents + 1):  # wherever the solver has come to
        (found,) = prediction.predict(0.5, _no_context, lambda now=now: now.to(dtype))
        assert found.dtype == dtype
        near = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(found.float(), velocity(0.5, now), rtol=near, atol=near)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_models_noise_is_told_from_its_references(edit: Edit) -> None:
    model, noise = qwen_transformer(zero_cond_t=True), []
    config = TeaCacheConfig(gate="schedule", schedule=(0, 1), num_inference_steps=STEPS)
    with teacache(model, config), torch.no_grad():
        for step, sigma in enumerate((1.0, 0.9, 0.7)):
            latents = edit.with_seed(step).latents()
            velocity = model(**edit.kwargs(latents, sigma))[0][:, : edit.noise]
            noise.append(latents + (1 - sigma) * velocity)
    torch.testing.assert_close(noise[2], noise[1] + 2 * (noise[1] - noise[0]), rtol=1e-4, atol=1e-4)


def test_where_the_input_does_not_hold_the_latents_the_output_is_predicted_unless_the_noise_was_asked_for() -> None:
    output, joined = (torch.randn(1, 4, 3),), torch.randn(1, 4, 6)
    for latents, found in ((lambda: joined, r"\(1, 4, 6\)"), (lambda: None, "does not hold them")):
        prediction = Prediction("noise", 1, instead="output")
        assert torch.equal(prediction.value(None, output, 0.5, latents), output[0])
        assert prediction.subject == "output"
        with pytest.raises(StepCacheError, match=rf"\(1, 4, 3\); this one .*{found}.*output_linear"):
            Prediction("noise", 1).value(None, output, 0.5, latents)


def test_only_a_default_prediction_may_give_way() -> None:
    class Joined(torch.nn.Module):
        """Latents come with a mask in each token, as in inpainting models; nobody has described the model."""

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
            return (hidden_states[..., :3] * timestep,)

    def denoised(**settings: Any) -> str:
        model = Joined()
        config = TeaCacheConfig(gate="schedule", schedule=(0, 1), num_inference_steps=4, **settings)
        with cached(model, config) as trace:
            for sigma in (1.0, 0.75, 0.5, 0.25):
                model(hidden_states=torch.ones(1, 4, 6), timestep=torch.tensor([sigma]))
        return trace.summary().partition("[")[2].partition("]")[0]

    assert denoised() == "cc.c"
    with pytest.raises(StepCacheError, match="Choose prediction 'output_linear'"):
        denoised(prediction="noise_linear")


@pytest.mark.parametrize(
    "prediction", ["residual", "residual_linear", "output", "output_linear", "noise", "noise_linear"]
)
def test_rows_of_a_batch_are_those_of_the_sample_alone(prediction: str) -> None:
    for tolerance in [0.02 * 1.2**power for power in range(20)]:
        settings = {"gate": "error", "error_tolerance": tolerance, "prediction": prediction}
        config = TeaCacheConfig.model_validate(settings)
        together, pattern = _Pictures([3, 11]).run(config)
        if "p" in pattern:
            break
    assert "p" in pattern, "the test needs a step in which one row is computed and the other is not"
    for row, seed in enumerate([3, 11]):
        alone, _ = _Pictures([seed]).run(config)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_one_decision_for_the_batch_computes_all_of_it() -> None:
    config = ERROR.model_copy(update={"per_sample": False})
    _, pattern = _Pictures([3, 11]).run(config)
    assert "p" not in pattern and "." in pattern


class _Pictures:
    """A batch of latents, some of which move faster than others, integrated by hand."""

    def __init__(self, seeds: list[int]) -> None:
        self.seeds = seeds

    def run(self, config: TeaCacheConfig) -> tuple[torch.Tensor, str]:
        pipe = Pipeline(qwen_transformer())
        pipe.scheduler.set_timesteps(12)
        edit = replace(EDIT, batch=len(self.seeds))
        one = [EDIT.with_seed(seed).kwargs(EDIT.with_seed(seed).latents() * seed, 1.0) for seed in self.seeds]
        latents = torch.cat([kwargs["hidden_states"][:, : EDIT.noise] for kwargs in one])
        references = torch.cat([kwargs["hidden_states"][:, EDIT.noise :] for kwargs in one])
        with cached(pipe, config) as trace, torch.no_grad():
            for t in pipe.scheduler.timesteps:
                kwargs = edit.kwargs(latents, float(t) / 1000)
                kwargs["hidden_states"] = torch.cat([latents, references], dim=1)
                kwargs["encoder_hidden_states"] = torch.cat([each["encoder_hidden_states"] for each in one])
                output = pipe.transformer(**kwargs)[0][:, : EDIT.noise]
                latents = pipe.scheduler.step(output, t, latents)[0]
        return latents, trace.summary().partition("[")[2].partition("]")[0]


def test_a_predicted_output_runs_nothing_of_the_model() -> None:
    model = qwen_transformer()
    config = TeaCacheConfig(gate="schedule", schedule=(0, 1), num_inference_steps=STEPS)
    with teacache(model, config), torch.no_grad():
        model(**EDIT.kwargs(EDIT.latents(), 1.0))
        model(**EDIT.kwargs(EDIT.latents(), 0.9))
        with counted([part for part in model.modules() if part is not model]) as ran:
            model(**EDIT.kwargs(EDIT.latents(), 0.8))
    assert ran == []


def test_the_error_gate_reads_once_a_computed_step_and_a_schedule_never() -> None:
    reads: dict[str, list[int]] = {"error": [], "schedule": []}
    patterns = {}
    for gate, found in reads.items():
        pipe = Pipeline(qwen_transformer())
        pipe.scheduler.set_timesteps(STEPS)
        config = ERROR.model_copy(update={"num_inference_steps": None})
        if gate == "schedule":
            config = TeaCacheConfig(gate="schedule", schedule=patterns["error"])
        latents = EDIT.latents()
        with cached(pipe, config) as trace, torch.no_grad():
            for t in pipe.scheduler.timesteps:
                arguments = {branch: EDIT.kwargs(latents, float(t) / 1000, branch) for branch in GUIDED.branches}
                with DeviceReads() as mode:
                    for branch, kwargs in arguments.items():
                        with pipe.transformer.cache_context(branch):
                            output = pipe.transformer(**kwargs)[0]
                found.append(mode.count)
                latents = pipe.scheduler.step(output[:, : EDIT.noise], t, latents)[0]
        patterns[gate] = trace.schedule()
    assert patterns["schedule"] == patterns["error"]
    assert 3 <= len(patterns["error"]) < STEPS
    assert max(reads["error"]) <= 1 and sum(reads["error"]) <= len(patterns["error"])
    assert reads["schedule"] == [0] * STEPS


def test_a_tolerance_of_zero_is_the_stock_model() -> None:
    stock = velocities(qwen_transformer(), GUIDED, STEPS)
    found = run(ERROR.model_copy(update={"error_tolerance": 0.0}), GUIDED)
    assert all(torch.equal(a, b) for branch in stock for a, b in zip(stock[branch], found[branch], strict=True))


def test_all_branches_skip_the_same_steps() -> None:
    model = qwen_transformer()
    with cached(model, ERROR) as trace:
        velocities(model, GUIDED, STEPS)
    steps = {branch: [s.decision for s in trace.steps if s.branch == branch] for branch in GUIDED.branches}
    assert steps["cond"] == steps["uncond"]
    assert trace.skipped


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"gate": "schedule"}, "schedule"),
        ({"schedule": [0, 1]}, "schedule"),
        ({"gate": "schedule", "schedule": [1, 2]}, "step 0"),
        ({"gate": "schedule", "schedule": [0, 1, 1]}, "once"),
        ({"gate": "eror"}, "error"),
        ({"error_tolerance": -1}, "greater"),
        ({"prediction": "linear"}, "residual_linear"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        TeaCacheConfig.model_validate(settings)


policies = st.builds(
    ErrorPolicy,
    tolerance=st.floats(1e-6, 1),
    order=st.sampled_from([0, 1]),
    ret_steps=st.integers(1, 4),
    cutoff_steps=st.integers(1, 3),
    max_consecutive_skips=st.integers(1, 6),
)


@given(policies, st.lists(st.floats(0, 1e3) | st.just(float("nan")), min_size=30, max_size=30))
def test_the_error_policy_keeps_its_limits_whatever_is_measured(policy: ErrorPolicy, defects: list[float]) -> None:
    levels = [*sigmas(30), 0.0]
    state, computed = ErrorState(), []
    for step, (now, following) in enumerate(itertools.pairwise(levels)):
        decision, state = decide_by_error(policy, state, now, following, step, 30)
        if decision.compute:
            computed.append(step)
            state = after_computed(policy, state, now, defects[step])
        else:
            assert state.accumulated < policy.tolerance
    assert set(range(max(policy.ret_steps, policy.order + 2))) <= set(computed)
    assert set(range(30 - policy.cutoff_steps, 30)) <= set(computed)
    assert max(b - a for a, b in itertools.pairwise(computed)) <= policy.max_consecutive_skips + 1


def test_a_straight_path_is_skipped_as_far_as_allowed_and_a_bent_one_is_not() -> None:
    policy, levels = ErrorPolicy(0.001), [*sigmas(30), 0.0]
    counts = []
    for bend in (0.0, 1.0, 10.0):
        state, computed = ErrorState(), 0
        for step, (now, following) in enumerate(itertools.pairwise(levels)):
            decision, state = decide_by_error(policy, state, now, following, step, 30)
            if decision.compute:
                known, computed = state.computed[:2], computed + 1
                defect = bend * abs((now - known[0]) * (now - known[1])) if len(known) == 2 else None
                state = after_computed(policy, state, now, defect)
        counts.append(computed)
    assert counts[0] < counts[1] <= counts[2]
    assert counts[0] == 3 + 26 // 5 + 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "rel_l1_thresh 0.2"),
        ({"gate": "error"}, "error_tolerance 0.001"),
        ({"gate": "schedule", "schedule": [0, 1, 5]}, "3 steps computed"),
        ({"profile": "auto"}, "profile auto"),
    ],
)
def test_the_report_names_the_dial_that_counts(settings: dict[str, Any], words: str) -> None:
    config = TeaCacheConfig.model_validate(settings)
    assert config.in_short == words
    assert config.is_as_published == (config.gate == "distance")
