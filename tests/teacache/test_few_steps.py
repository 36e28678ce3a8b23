"""Models distilled to few steps, with LightX2V's names of the settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.denoising import EDIT, counted, equal, qwen_transformer, sigmas, velocities
from tests.teacache.skipped_steps import teacache

from dittocache.sampling.session import cached
from dittocache.teacache.apply import setup_cache
from dittocache.teacache.config import TeaCacheConfig

LIGHTX2V: dict[str, Any] = {"coefficients": [1.0, 0.0], "ret_steps": 1, "num_inference_steps": 4}


def run(model: Any, steps: int = 4) -> str:
    """Which of the steps computed; the picture does not move, so that distances are of t alone."""
    pattern = ""
    with torch.no_grad():
        for sigma in sigmas(steps):
            with counted(model.transformer_blocks[:1]) as ran:
                model(**EDIT.kwargs(EDIT.latents(), sigma))
            pattern += "c" if ran else "."
    return pattern


def distances() -> list[float]:
    model = qwen_transformer()
    with cached(model, TeaCacheConfig.model_validate({**LIGHTX2V, "teacache_thresh": 1e6})) as trace:
        run(model)
    return [float(record.distance) for record in trace.steps[1:3] if record.distance is not None]


def test_four_steps_compute_the_first_and_last_and_skip_the_middle_by_the_threshold() -> None:
    second, third = distances()
    thresholds = {
        min(second, third) / 2: "cccc",
        second + third / 2: "c.cc",
        second + third + 0.01: "c..c",
    }
    for threshold, expected in thresholds.items():
        model = qwen_transformer()
        adapter = setup_cache(model, "tea_cache", {**LIGHTX2V, "teacache_thresh": threshold})
        assert adapter is not None
        assert run(model) == run(model) == expected


def test_the_linear_coefficients_of_lightx2v_are_of_any_degree() -> None:
    """`[1.0]` is the constant 1, whatever the distance."""
    for threshold, expected in ((0.9, "cccc"), (1.1, "c.cc"), (2.1, "c..c")):
        model = qwen_transformer()
        setup_cache(model, "tea_cache", {**LIGHTX2V, "coefficients": [1.0], "teacache_thresh": threshold})
        assert run(model) == expected


@pytest.mark.parametrize("ret_steps", [2, 3, 4])
def test_more_first_steps_leave_less_to_skip(ret_steps: int) -> None:
    said: list[str] = []
    model = qwen_transformer()
    from dittocache.teacache.adapter import TeaCacheAdapter

    config = TeaCacheConfig.model_validate({**LIGHTX2V, "teacache_thresh": 1e6, "ret_steps": ret_steps})
    TeaCacheAdapter(config).apply(model, say=said.append)
    assert run(model) == {2: "cc.c", 3: "cccc", 4: "cccc"}[ret_steps]
    assert bool(said) == (ret_steps > 2)
    if said:
        assert "can skip none of 4 steps" in said[0] and "reference KV cache" in said[0]


def test_computed_steps_of_four_are_stock() -> None:
    model = qwen_transformer()
    stock = velocities(model, EDIT, 4)
    with teacache(model, TeaCacheConfig.model_validate({**LIGHTX2V, "teacache_thresh": 1e6})):
        found = velocities(model, EDIT, 4)
    same = [torch.equal(one, other) for one, other in zip(found["cond"], stock["cond"], strict=True)]
    assert same == [True, False, False, True]
    assert equal(stock, velocities(model, EDIT, 4))
