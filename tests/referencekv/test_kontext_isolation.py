"""Isolated references of FLUX Kontext: modulation is one vector, and yet the references have one of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.denoising import flux_transformer, relative_error, sigmas
from tests.referencekv.cached_steps import reference_kv
from tests.referencekv.dense_attention import DenseAttention
from tests.referencekv.test_kontext import kontext_kwargs

from dittocache.families.registry import adapter_of
from dittocache.referencekv.isolated_block import PASSING
from dittocache.referencekv.isolation import isolate_references

NOISE, REFERENCE = 16, 24


def at_rest(seed: int = 0) -> dict[str, Any]:
    """A call whose live modulation is that of isolated references: t, guidance and pooled prompt are zero."""
    return kontext_kwargs(0.0, seed) | {"guidance": torch.zeros(1)}


@torch.no_grad()
def test_where_all_tokens_are_modulated_alike_it_is_the_stock_model_with_a_mask() -> None:
    dense, model = flux_transformer(), flux_transformer()
    dense.set_attn_processor(DenseAttention(adapter_of(dense), [REFERENCE]))
    expected = dense(**at_rest())[0][:, :NOISE]
    stock = model(**at_rest())[0][:, :NOISE]
    with isolate_references(model):
        found = model(**at_rest())[0]
        moved = model(**kontext_kwargs(0.5))[0]
    assert relative_error(found, expected) < 1e-5
    assert relative_error(stock, expected) > 1e-2
    assert relative_error(moved, expected) > 1e-2  # the noise is modulated by the live t
    assert torch.equal(model(**at_rest())[0][:, :NOISE], stock)


@pytest.mark.parametrize("other", ["step", "noise", "prompt", "guidance"])
@torch.no_grad()
def test_keys_and_values_follow_from_the_reference_alone(other: str) -> None:
    model = flux_transformer()
    isolate_references(model)
    found: list[list[torch.Tensor]] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["joint_attention_kwargs"][PASSING].keep = lambda block, key, value, _: found[-1].extend((key, value))

    model.register_forward_pre_hook(record, with_kwargs=True)
    first = kontext_kwargs(1.0)
    changed = {
        "step": kontext_kwargs(0.25),
        "noise": first | {"hidden_states": first["hidden_states"].clone()},
        "prompt": kontext_kwargs(1.0, text=1.0),
        "guidance": first | {"guidance": torch.tensor([1.0])},
    }[other]
    if other == "noise":
        changed["hidden_states"][:, :NOISE] += 1
    outputs = []
    for kwargs in (first, changed):
        found.append([])
        outputs.append(model(**kwargs)[0])
    assert len(found[0]) == 2 * 4
    assert all(map(torch.equal, *found))
    assert not torch.equal(*outputs)


@torch.no_grad()
def test_the_cache_is_exact() -> None:
    model = flux_transformer()
    isolate_references(model)
    steps = [kontext_kwargs(t) for t in sigmas(4)]
    prompt = steps[0]["encoder_hidden_states"]  # one request: its prompt embeddings are the same object at every step
    steps = [{**kwargs, "encoder_hidden_states": prompt} for kwargs in steps]
    uncached = [model(**kwargs)[0] for kwargs in steps]
    with reference_kv(model) as hook:
        for kwargs, expected in zip(steps, uncached, strict=True):
            assert torch.equal(model(**kwargs)[0], expected)
            assert hook.bytes_held == 2 * 4 * REFERENCE * 32 * 4


def test_gradients_are_the_same_with_gradient_checkpointing() -> None:
    model = flux_transformer().requires_grad_(True)
    isolate_references(model)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        model(**kontext_kwargs(0.5))[0].square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert all(map(torch.equal, gradients(), plain))
    assert len(plain) > 50
