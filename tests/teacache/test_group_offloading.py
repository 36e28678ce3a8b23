"""diffusers' group offloading: layers that a skipped step calls by themselves find their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from tests.denoising import flux_transformer, qwen_transformer, sigmas, velocities
from tests.sampled_models import MODELS
from tests.teacache.sampled_runs import SCHEDULE, SKIPPING, denoise
from tests.teacache.skipped_steps import GUIDED, STEPS
from tests.teacache.test_hook import flux_kwargs

from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second device weights that are away are NaN."""
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def parameters(group: Any) -> list[torch.nn.Parameter]:
        return [*(one for module in group.modules for one in module.parameters()), *group.parameters]

    def offload(group: Any) -> None:
        for one in parameters(group):
            if one not in kept:
                kept[one], one.data = one.data, torch.full_like(one.data, torch.nan)

    def onload(group: Any) -> None:
        for one in parameters(group):
            one.data = kept.pop(one, one.data)

    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)


def flux_run(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**flux_kwargs(sigma))[0][:, :16] for sigma in sigmas(STEPS)]


RUNS: dict[str, tuple[Any, Any]] = {
    "Qwen-Image": (qwen_transformer, lambda model: sum(velocities(model, GUIDED, STEPS).values(), [])),
    "FLUX.1": (flux_transformer, flux_run),
    **{name: (model.build, lambda built, model=model: denoise(built, model)) for name, model in MODELS.items()},
}


@pytest.mark.parametrize("config", [SKIPPING, SCHEDULE], ids=["residual", "output"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", RUNS)
def test_weights_are_brought_in_where_they_are_needed(name: str, level: str, config: TeaCacheConfig) -> None:
    build, run = RUNS[name]
    plain = build()
    with cached(plain, config) as trace:
        expected = run(plain)
    assert trace.skipped > 0
    model = build()
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type=level, **options)
    assert all(one.isnan().all() for one in model.parameters())
    with cached(model, config):
        found = run(model)
    assert all(map(torch.equal, found, expected))
