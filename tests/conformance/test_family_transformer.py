"""Every family: one forward pass of the transformer taken apart for the sampling caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dittocache.families.base import Family
from dittocache.families.registry import FAMILIES, adapter_of


def test_every_family_has_a_case(all_cases: Any) -> None:
    assert {case.family_name for case in all_cases} == set(FAMILIES)


def test_edit_plus_is_complete(all_cases: Any) -> None:
    edit = [case for case in all_cases if case.family_name == "qwen-image-edit-plus"]
    assert len(edit) == 2  # live t and zero_cond_t
    assert all(case.capabilities == frozenset().union(*(one.capabilities for one in all_cases)) for case in edit)


@pytest.mark.capability("step_cache")
def test_the_transformer_is_known_by_its_class(family: Family, pipe: Any) -> None:
    adapter = adapter_of(pipe.transformer)
    assert type(adapter) is type(family.transformer)
    assert adapter.class_name == type(pipe.transformer).__name__


@pytest.mark.capability("step_cache")
def test_a_pass_taken_apart_and_put_together_is_the_stock_pass_bit_for_bit(
    family: Family, pipe: Any, forward_kwargs: dict[str, Any]
) -> None:
    with torch.no_grad():
        context = family.transformer.extract_context(pipe.transformer, **forward_kwargs)
        context.validate()
        ours = context.postprocess(context.run_transformer_blocks()[0])
        stock = pipe.transformer(**forward_kwargs)
    assert torch.equal(ours[0], stock[0])


@pytest.mark.capability("step_cache")
def test_the_signal_moves_with_the_timestep(family: Family, pipe: Any, forward_kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        first = family.transformer.extract_context(pipe.transformer, **forward_kwargs).modulated_input
        again = family.transformer.extract_context(pipe.transformer, **forward_kwargs).modulated_input
        later = {**forward_kwargs, "timestep": forward_kwargs["timestep"] * 0.8}
        moved = family.transformer.extract_context(pipe.transformer, **later).modulated_input
    assert torch.equal(first, again)
    assert (moved - first).abs().mean() / first.abs().mean() > 1e-3


@pytest.mark.capability("step_cache")
def test_token_layout_counts_all_tokens(family: Family, pipe: Any, case: Any, forward_kwargs: dict[str, Any]) -> None:
    layout = family.transformer.token_layout(pipe.transformer, forward_kwargs)
    tokens = forward_kwargs["hidden_states"].shape[1]
    assert layout.noise == 128 // 16 * (96 // 16)
    assert layout.noise + layout.reference == tokens
    assert (layout.reference > 0) == (case.controls > 0)


@pytest.mark.capability("references")
def test_every_block_has_an_attention_module(family: Family, pipe: Any) -> None:
    modules = family.transformer.attention_modules(pipe.transformer)
    assert len(modules) == len(family.transformer.blocks(pipe.transformer))
    assert all(hasattr(module, "processor") for module in modules)
    assert family.transformer.reference_is_exact(pipe.transformer) is False
