"""What an extractor gives: validated field by field, and asked for once a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.denoising import EDIT, qwen_transformer, sigmas
from torch import nn

from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.extractors import EXTRACTOR_REGISTRY, CacheContext, get_extractor, register_extractor

STEPS = 6
MODEL_TYPE = "QwenImageTransformer2DModel"


def context(**fields: Any) -> CacheContext:
    good: dict[str, Any] = {
        "modulated_input": torch.ones(2, 3, 4),
        "hidden_states": torch.ones(2, 3, 4),
        "encoder_hidden_states": torch.ones(2, 5, 4),
        "temb": torch.ones(2, 4),
        "run_transformer_blocks": lambda: (torch.ones(2, 3, 4),),
        "postprocess": lambda hidden_states: hidden_states,
    }
    return CacheContext(**{**good, **fields})


def test_a_complete_context_is_valid() -> None:
    context().validate()
    context(encoder_hidden_states=None, extra_states={"anything": 1}).validate()
    context(modulated_input=torch.ones(2, 4)).validate()  # the timestep embedding itself, as for CogVideoX


WRONG = {
    "modulated_input": (None, TypeError, "modulated_input must be a torch.Tensor, found NoneType"),
    "hidden_states": ([1.0], TypeError, "hidden_states must be a torch.Tensor, found list"),
    "temb": (0.5, TypeError, "temb must be a torch.Tensor, found float"),
    "encoder_hidden_states": ("text", TypeError, "encoder_hidden_states must be a torch.Tensor or None, found str"),
    "run_transformer_blocks": (torch.ones(1), TypeError, "run_transformer_blocks must be callable, found Tensor"),
    "postprocess": (None, TypeError, "postprocess must be callable, found NoneType"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named(name: str) -> None:
    value, error, said = WRONG[name]
    with pytest.raises(error, match=said):
        context(**{name: value}).validate()


def test_batches_must_agree() -> None:
    with pytest.raises(ValueError, match="modulated_input has batch size 1, hidden_states has 2"):
        context(modulated_input=torch.ones(1, 3, 4)).validate()
    with pytest.raises(ValueError, match=r"modulated_input must have a batch dimension, found shape \(\)"):
        context(modulated_input=torch.tensor(1.0)).validate()


@pytest.fixture
def counting() -> Iterator[list[float]]:
    """An extractor of the user's that notes each time it is asked."""
    family, asked = get_extractor(MODEL_TYPE), []

    def mine(module: nn.Module, **kwargs: Any) -> CacheContext:
        asked.append(float(kwargs["timestep"][0]))
        return family(module, **kwargs)

    register_extractor(MODEL_TYPE, mine)
    yield asked
    del EXTRACTOR_REGISTRY[MODEL_TYPE]


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 1e6])
def test_an_extractor_is_asked_once_a_step(counting: list[float], threshold: float) -> None:
    model = qwen_transformer()
    config = TeaCacheConfig(rel_l1_thresh=threshold, coefficients=(1.0, 0.0), num_inference_steps=STEPS)
    with cached(model, config) as trace, torch.no_grad():
        for sigma in sigmas(STEPS):
            model(**EDIT.kwargs(EDIT.latents(), sigma))
    assert trace.skipped == (4 if threshold > 1 else 0)
    assert counting == pytest.approx(sigmas(STEPS))


def test_the_timestep_embedding_may_be_the_signal(counting: list[float]) -> None:
    """The guide's third pattern: `modulated_input = temb.clone()`, `(B, D)`."""
    family, seen = get_extractor(MODEL_TYPE), []

    def by_timestep(module: nn.Module, **kwargs: Any) -> CacheContext:
        found = family(module, **kwargs)
        found.modulated_input = found.temb.clone()
        seen.append(found.temb)
        return found

    register_extractor(MODEL_TYPE, by_timestep)
    model = qwen_transformer()
    config = TeaCacheConfig(rel_l1_thresh=1e6, coefficients=(1.0, 0.0), num_inference_steps=STEPS)
    with cached(model, config) as trace, torch.no_grad():
        for sigma in sigmas(STEPS):
            model(**EDIT.kwargs(EDIT.latents(), sigma))
    expected = (seen[1] - seen[0]).abs().mean() / seen[0].abs().mean()
    assert trace.steps[1].distance == pytest.approx(float(expected), rel=1e-5)
    assert trace.skipped == 4


def test_a_wrong_context_stops_the_run(counting: list[float]) -> None:
    family = get_extractor(MODEL_TYPE)

    def broken(module: nn.Module, **kwargs: Any) -> CacheContext:
        found = family(module, **kwargs)
        found.temb = None  # type: ignore[assignment]
        return found

    register_extractor(MODEL_TYPE, broken)
    model = qwen_transformer()
    with pytest.raises(TypeError, match=r"CacheContext\.temb"), cached(model, TeaCacheConfig()) as trace:
        model(**EDIT.kwargs(EDIT.latents(), 1.0))
    assert trace.steps == []
