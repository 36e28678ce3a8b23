"""TeaCache beside what users put on a transformer: torch.compile, offloading, ControlNet, several references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from tests.denoising import EDIT, equal, flux_transformer, qwen_transformer, sigmas, velocities
from tests.teacache.skipped_steps import GUIDED, SKIPPED, SKIPPING, STEPS, run, teacache
from torch._dynamo.testing import CompileCounter

from dittocache.errors import StepCacheError
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

ERROR = TeaCacheConfig(gate="error", error_tolerance=0.5, num_inference_steps=STEPS)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [SKIPPING, ERROR], ids=["distance", "error"])
def test_compiled_blocks_stay_one_graph_without_a_break(config: TeaCacheConfig, fresh_compiler: None) -> None:
    model, graphs = qwen_transformer(), CompileCounter()
    for block in model.transformer_blocks:
        block.compile(backend=graphs, fullgraph=True)
    with cached(model, config) as trace:
        found = velocities(model, EDIT, STEPS)
        again = velocities(model, EDIT, STEPS)
    assert trace.skipped > 0
    assert graphs.frame_count == 1  # as without the cache: all blocks share it
    assert equal(found, run(config))
    assert equal(found, again)


def test_a_compiled_transformer_is_found_in_its_shell() -> None:
    model = qwen_transformer()
    shell: Any = torch.compile(model, backend="eager")
    with cached(shell, SKIPPING) as trace:
        velocities(model, EDIT, STEPS)
    assert trace.skipped == len(SKIPPED)


@pytest.mark.parametrize("config", [SKIPPING, ERROR], ids=["distance", "error"])
def test_offloaded_weights_are_brought_in_where_they_are_needed(config: TeaCacheConfig) -> None:
    model = cpu_offload(qwen_transformer(), execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    with cached(model, config):
        assert equal(velocities(model, GUIDED, STEPS), run(config, GUIDED))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading_of_diffusers_goes_with_it(level: str) -> None:
    model = qwen_transformer()
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type=level, **options)
    with cached(model, SKIPPING):
        assert equal(velocities(model, GUIDED, STEPS), run(SKIPPING, GUIDED))


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("config", [SKIPPING, ERROR], ids=["distance", "error"])
def test_gradients_on_or_switched_off_for_good_change_nothing(config: TeaCacheConfig, gradients: Any) -> None:
    def steps(model: Any, context: Any) -> list[torch.Tensor]:
        with context():
            return [model(**EDIT.kwargs(EDIT.latents(), t))[0][:, : EDIT.noise].detach() for t in sigmas(STEPS)]

    model = qwen_transformer().requires_grad_(True)
    with teacache(model, config) as hook:
        found = steps(model, gradients)
        kept = hook._runs[max(hook._runs)].branches.values()
        assert not any(branch.prediction._now.requires_grad for branch in kept), "a graph would be held alive"
        again = steps(model, torch.no_grad)  # on what the other kind of tensors has left
    fresh = qwen_transformer()
    with teacache(fresh, config):
        plain = steps(fresh, torch.no_grad)
    assert all(map(torch.equal, found, plain))
    assert all(map(torch.equal, again, plain))


def test_outputs_of_every_kind_are_predicted() -> None:
    config = TeaCacheConfig(gate="schedule", schedule=(0, 1, 4), num_inference_steps=STEPS)
    for return_dict in (True, False):
        model = qwen_transformer()
        with cached(model, config), torch.no_grad():
            for t in sigmas(STEPS):
                found = model(**{**EDIT.kwargs(EDIT.latents(), t), "return_dict": return_dict})
                sample = found.sample if return_dict else found[0]
                assert sample.shape[1] in (EDIT.noise, EDIT.noise + EDIT.reference)
                assert type(found).__name__ == ("Transformer2DModelOutput" if return_dict else "tuple")


def test_flux_skips_by_error_without_running_anything() -> None:
    from tests.teacache.test_hook import flux_kwargs

    config = ERROR.model_copy(update={"error_tolerance": 1e6})
    model = flux_transformer()
    with cached(model, config) as trace, torch.no_grad():
        for t in sigmas(STEPS):
            model(**flux_kwargs(t))
    assert trace.summary().partition("[")[2].startswith("ccc....c")


class Unknown(torch.nn.Module):
    """A denoiser of a kind that no family knows; its velocity is a straight line in sigma."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.randn(1, 4, 8, 8))
        self.calls = 0

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        self.calls += 1
        return (self.slope * timestep.view(-1, 1, 1, 1) + 1,)


def test_a_model_that_nobody_knows_is_cached_by_its_output() -> None:
    model, plain = Unknown(), []
    with torch.no_grad():
        plain = [model(torch.zeros(1, 4, 8, 8), timestep=torch.tensor([t]))[0] for t in sigmas(STEPS)]
        model.calls = 0
        with cached(model, TeaCacheConfig(gate="error", num_inference_steps=STEPS)) as trace:
            found = [model(torch.zeros(1, 4, 8, 8), timestep=torch.tensor([t]))[0] for t in sigmas(STEPS)]
    assert model.calls == trace.computed == 4  # three to know the path, and the last one
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(StepCacheError, match="gate 'error', which needs none"), cached(model, TeaCacheConfig()):
        pass
