"""Context-parallel transformers: every rank decides alike, and skipped steps are those of one process."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.denoising import EDIT, qwen_transformer, velocities
from tests.teacache import two_ranks
from tests.teacache.skipped_steps import SKIPPED, SKIPPING, STEPS

from dittocache.errors import StepCacheError
from dittocache.sampling.session import cached
from dittocache.teacache.ranks import over_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    fork = multiprocessing.get_context("fork")  # to import torch and diffusers anew would take longer than the runs
    workers = [
        fork.Process(
            target=two_ranks.run_rank, args=(rank, str(folder / "meeting"), str(folder / f"{rank}.pt")), daemon=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("gate", two_ranks.CONFIGS)
def test_ranks_with_distances_of_their_own_decide_as_one(ranks: list[dict[str, Any]], gate: str) -> None:
    alone = [found[f"{gate}, alone"][0] for found in ranks]
    assert alone[0] != alone[1]  # without a word to each other they would wait for each other for ever
    agreed = [found[f"{gate}, agreed"] for found in ranks]
    assert agreed[0][0] == agreed[1][0]
    assert agreed[0][0].count("s") > 0
    assert agreed[0][1] == agreed[1][1]


@pytest.mark.parametrize("gate", two_ranks.CONFIGS)
@pytest.mark.parametrize("family", two_ranks.BUILD)
def test_split_tokens_make_the_picture_of_one_process(ranks: list[dict[str, Any]], family: str, gate: str) -> None:
    one_process = two_ranks.cached_edits(family, two_ranks.BUILD[family]())
    pattern = one_process[f"{gate} pattern"]
    assert 0 < pattern.count("s") < STEPS
    for found in ranks:
        assert found[family][f"{gate} pattern"] == pattern
        for name in ("stock", gate):
            for ours, theirs in zip(found[family][name], one_process[name], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_one_process_says_nothing_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("communicated")

    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    model = qwen_transformer()
    model._parallel_config = SimpleNamespace(context_parallel_config=None)  # tensor-parallel: every rank has all tokens
    assert over_ranks(model) is None
    with cached(model, SKIPPING) as trace:
        velocities(model, EDIT, STEPS)
    assert trace.skipped == len(SKIPPED)


def test_splitting_the_tokens_under_the_cache_is_refused() -> None:
    model = qwen_transformer()
    with cached(model, SKIPPING), pytest.raises(StepCacheError, match="Call enable_parallelism first"):
        mesh = SimpleNamespace(get_group=lambda: None)
        model._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(_flattened_mesh=mesh))
        velocities(model, EDIT, STEPS)
