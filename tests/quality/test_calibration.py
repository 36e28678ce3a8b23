"""What is recorded is what the gate reads; the fit goes through the origin, and says when it is bad."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.denoising import EDIT, equal, flux_transformer, qwen_transformer, velocities

from dittocache.errors import StepCacheError
from dittocache.quality.calibration.fitting import calibrated, explained, fitted, remarks
from dittocache.quality.calibration.plot import plot_calibration
from dittocache.quality.calibration.recording import Point, recorded
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.policy import polynomial

STEPS = 7
GUIDED = replace(EDIT, branches=("cond", "uncond"))


def record(model: Any, edit: Any = EDIT) -> tuple[Any, dict[str, list[torch.Tensor]]]:
    with recorded(model, STEPS) as found:
        output = velocities(model, edit, STEPS, feed=True)
    return found, output


@pytest.mark.parametrize("model", [qwen_transformer, lambda: qwen_transformer(zero_cond_t=True)], ids=["plain", "2511"])
def test_the_gate_that_ships_reads_the_same_distances(model: Any) -> None:
    found, _ = record(model())
    computing = TeaCacheConfig(rel_l1_thresh=1e-9, coefficients=(1.0, 0.0), num_inference_steps=STEPS)
    other = model()
    with cached(other, computing) as trace:
        velocities(other, EDIT, STEPS, feed=True)
    read = {step.step: step.distance for step in trace.steps if step.distance is not None}
    assert {point.step: point.distance for point in found.points} == read
    assert sorted(read) == list(range(1, STEPS - 1))  # neither the first nor the last step


def test_the_change_is_that_of_the_models_own_output() -> None:
    found, output = record(qwen_transformer(), GUIDED)
    assert found.branches == {"cond", "uncond"} and found.tokens == EDIT.noise and found.steps == STEPS
    assert len(found.points) == 2 * (STEPS - 2)
    for point in found.points:
        now, before = output[point.branch][point.step], output[point.branch][point.step - 1]
        assert point.output == pytest.approx(float((now - before).abs().mean() / before.abs().mean()), rel=1e-4)
        assert point.residual > 0


def test_recording_changes_nothing_and_leaves_nothing() -> None:
    model = qwen_transformer()
    _, output = record(model)
    fresh = qwen_transformer()
    assert equal(output, velocities(fresh, EDIT, STEPS, feed=True))
    assert not hasattr(model, "_diffusers_hook") and "forward" not in model.__dict__


def test_a_session_may_stand_around_it() -> None:
    model = qwen_transformer()
    with recorded(model, STEPS) as found, cached(model) as trace:
        velocities(model, EDIT, STEPS)
    assert len(found.points) == STEPS - 2 and trace.computed == STEPS


def test_a_batch_gives_a_point_for_each_sample() -> None:
    found, _ = record(qwen_transformer(), replace(EDIT, batch=3))
    assert len(found.points) == 3 * (STEPS - 2)


def test_a_model_that_nobody_knows_is_refused() -> None:
    with pytest.raises(StepCacheError, match="model_type must be provided"), recorded(torch.nn.Linear(2, 2)):
        pass


COEFFICIENTS = st.lists(st.floats(-3, 3), min_size=1, max_size=4)


@settings(max_examples=50)
@given(COEFFICIENTS)
def test_the_polynomial_behind_the_points_is_found_again(coefficients: list[float]) -> None:
    exact = (*coefficients, 0.0)
    pairs = [(0.05 * number, polynomial(exact, 0.05 * number)) for number in range(1, 16)]
    found = fitted(pairs, len(coefficients))
    assert found[-1] == 0.0
    for distance, change in pairs:
        assert polynomial(found, distance) == pytest.approx(change, abs=1e-6)


def test_noise_is_averaged_not_followed() -> None:
    pairs = [(0.1, 0.21), (0.1, 0.19), (0.2, 0.41), (0.2, 0.39)]
    assert fitted(pairs, 1) == pytest.approx((2.0, 0.0))
    assert explained((2.0, 0.0), (0.1, 0.2), pairs) == pytest.approx(1 - 4e-4 / 0.0404, abs=1e-6)


def test_a_degree_that_the_points_cannot_carry_is_lowered() -> None:
    assert len(fitted([(0.1, 0.2), (0.2, 0.3)], 6)) == 3


def test_no_step_to_fit_on_is_said() -> None:
    with pytest.raises(StepCacheError, match="Take at least 4 steps"):
        fitted([], 4)


def test_distances_beyond_the_fitted_range_do_not_count_against_the_fit() -> None:
    pairs = [(0.1, 0.1), (0.2, 0.2), (5.0, -3.0)]
    assert explained((1.0, 0.0), (0.1, 0.2), pairs) == pytest.approx(1.0)


def points(law: Any, seed: int = 0) -> list[Point]:
    distances = torch.rand(40, generator=torch.Generator().manual_seed(seed)).tolist()
    return [Point(1, "cond", 0.1 + one, law(one), 2 * one) for one in distances]


def test_a_bad_fit_is_warned_about_with_what_to_do() -> None:
    rng = torch.Generator().manual_seed(5)
    unrelated = calibrated(points(lambda one: float(torch.rand(1, generator=rng))), points(lambda one: one), 2)
    (doubt,) = [words for words in remarks(unrelated) if words.startswith("residual")]
    assert "gate 'error', which needs no calibration" in doubt
    assert remarks({"output": calibrated(points(lambda one: one), points(lambda one: one, 1), 2)["output"]}) == []


def test_without_held_out_points_it_says_so() -> None:
    found = calibrated(points(lambda one: one), (), 2)
    assert found["residual"].r2_held_out is None
    assert any("no held-out steps" in words for words in remarks(found))


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    some, others = points(lambda one: one), points(lambda one: one, 1)
    path = plot_calibration(tmp_path / "plots" / "c.png", some, others, calibrated(some, others, 3))
    with Image.open(path) as picture:
        assert picture.width > picture.height > 300


def test_other_families_are_recorded_too() -> None:
    model = flux_transformer()
    edit = replace(EDIT, extra={})
    names = {"img_shapes", "encoder_hidden_states_mask"}

    with recorded(model, STEPS) as found, torch.no_grad():
        for step in range(STEPS):
            kwargs = {
                name: value
                for name, value in edit.kwargs(edit.latents(), 1 - step / STEPS).items()
                if name not in names
            }
            tokens = kwargs["hidden_states"].shape[1]
            kwargs |= {
                "hidden_states": kwargs["hidden_states"] * (1 + step),
                "pooled_projections": torch.ones(1, 6),
                "guidance": torch.ones(1),
                "img_ids": torch.zeros(tokens, 3),
                "txt_ids": torch.zeros(5, 3),
            }
            model(**kwargs)
    assert [point.step for point in found.points] == list(range(1, STEPS - 1))
