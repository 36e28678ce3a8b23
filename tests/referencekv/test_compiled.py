"""Blocks that were compiled by themselves: all of them share the graph of a full step and the graph of a cached one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.denoising import EDIT, equal, qwen_transformer, velocities
from tests.referencekv.cached_steps import reference_kv
from torch._dynamo.testing import CompileCounter

from dittocache.referencekv.config import ReferenceKVConfig

STEPS = 5
LINE = ReferenceKVConfig(refresh=2)


@pytest.fixture
def graphs() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def model_of(zero_cond_t: bool = False) -> Any:
    return qwen_transformer(zero_cond_t, layers=2)


def compiled(model: Any, graphs: CompileCounter) -> Any:
    for block in model.transformer_blocks:
        block.compile(backend=graphs, fullgraph=True)
    return model


def test_a_full_and_a_cached_step_are_two_graphs_for_all_blocks_and_runs(graphs: CompileCounter) -> None:
    plain, model = model_of(zero_cond_t=True), compiled(model_of(zero_cond_t=True), graphs)
    before = [block._compiled_call_impl for block in model.transformer_blocks]
    with reference_kv(plain, LINE):
        expected = velocities(plain, EDIT, STEPS)
    with reference_kv(model, LINE):
        assert equal(velocities(model, EDIT, STEPS), expected)
        assert graphs.frame_count == 2
        assert equal(velocities(model, EDIT, STEPS), expected)
    assert graphs.frame_count == 2
    after = [block._compiled_call_impl for block in model.transformer_blocks]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_blocks_that_are_compiled_while_the_cache_is_on_share_them_too(graphs: CompileCounter) -> None:
    model = model_of()
    with reference_kv(model, ReferenceKVConfig(refresh=(0,))):
        expected = velocities(model, EDIT, 3)
        compiled(model, graphs)
        assert equal(velocities(model, EDIT, 3), expected)
    assert graphs.frame_count == 2
