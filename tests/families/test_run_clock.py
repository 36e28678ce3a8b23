"""Runs, branches and steps told apart from what a transformer is called with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dittocache.families.run_clock import DenoisingCall, RunClock, bind_forward, request
from dittocache.families.transformer_side import TokenLayout

MODULE = nn.Identity()


class Scheduler:
    """What the clock looks at of a diffusers scheduler."""

    def __init__(self) -> None:
        self.timesteps = torch.zeros(0)
        self.step_index: int | None = None
        self.begin_index: int | None = None

    def set_timesteps(self, steps: int, begin: int | None = None) -> None:
        self.timesteps = torch.linspace(1000, 0, steps + 1)[:-1]
        self.step_index, self.begin_index = None, begin

    def step(self) -> None:
        self.step_index = (self.begin_index or 0) + 1 if self.step_index is None else self.step_index + 1


def locate(clock: RunClock, t: float, branch: str | None = None, tokens: int = 4, **announced: Any) -> DenoisingCall:
    context = None
    if branch is not None:
        context = SimpleNamespace(**{"name": branch, "step_index": None, "num_inference_steps": None} | announced)
    kwargs = {"hidden_states": torch.zeros(1, tokens, 2), "timestep": torch.tensor([t])}
    with clock.call(MODULE, context, kwargs) as call:
        return call


def places(calls: list[DenoisingCall]) -> list[tuple[int, str, int]]:
    return [(call.run, call.branch, call.step) for call in calls]


def test_bare_steps_follow_from_falling_timesteps_and_runs_from_rising_ones() -> None:
    clock = RunClock(num_inference_steps=3)
    calls = [locate(clock, t) for t in (1.0, 0.7, 0.3, 1.0, 0.7)]
    assert places(calls) == [(1, "default", step) for step in range(3)] + [(2, "default", step) for step in range(2)]
    assert calls[0].steps == 3


def test_named_branches_share_steps() -> None:
    clock = RunClock()
    calls = [locate(clock, t, branch) for t in (1.0, 0.5) for branch in ("cond", "uncond", "third")]
    assert places(calls) == [(1, branch, step) for step in (0, 1) for branch in ("cond", "uncond", "third")]
    assert calls[0].steps is None


def test_the_same_branch_at_the_same_timestep_is_a_restart() -> None:
    # After an interrupt at the first step the next picture begins at the same timestep.
    for branch in (None, "cond"):
        clock = RunClock()
        assert places([locate(clock, 1.0, branch), locate(clock, 1.0, branch)]) == [
            (run, branch or "default", 0) for run in (1, 2)
        ]


def test_more_steps_than_announced_are_a_new_run() -> None:
    # A run broken off early, its successor beginning lower (image to image): the count still ends runs.
    clock = RunClock(num_inference_steps=2)
    assert [call.run for call in (locate(clock, t) for t in (0.9, 0.8, 0.7, 0.6, 0.5))] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("tokens", [3, 5])
def test_another_shape_is_a_new_run(tokens: int) -> None:
    clock = RunClock()
    locate(clock, 1.0)
    assert locate(clock, 0.5, tokens=tokens).run == 2


def test_another_layout_of_as_many_tokens_is_a_new_run() -> None:
    layouts = {1.0: TokenLayout(2, 2), 0.7: TokenLayout(2, 2), 0.5: TokenLayout(3, 1)}
    adapter: Any = SimpleNamespace(
        token_layout=lambda module, kwargs: layouts[round(float(kwargs["timestep"]), 1)],
        run_arguments=lambda kwargs: kwargs,
        begin_run=lambda kwargs: None,
    )
    clock = RunClock(adapter)
    assert [locate(clock, t).run for t in layouts] == [1, 1, 2]


def test_with_a_scheduler_the_index_counts() -> None:
    scheduler = Scheduler()
    clock = RunClock(scheduler=scheduler)
    calls = []
    for steps in (3, 2, 2):
        scheduler.set_timesteps(steps)
        for _ in range(steps):
            calls += [locate(clock, 0.5, branch) for branch in ("cond", "uncond")]
            scheduler.step()
    assert [(call.run, call.step, call.steps) for call in calls[::2]] == [
        (1, 0, 3),
        (1, 1, 3),
        (1, 2, 3),
        (2, 0, 2),
        (2, 1, 2),
        (3, 0, 2),
        (3, 1, 2),
    ]
    assert [call.branch for call in calls] == ["cond", "uncond"] * 7


def test_an_interrupted_run_ends_where_the_scheduler_is_set_anew() -> None:
    scheduler = Scheduler()
    clock = RunClock(scheduler=scheduler)
    scheduler.set_timesteps(4)
    first = locate(clock, 1.0, "cond")
    scheduler.set_timesteps(4)
    assert (first.run, locate(clock, 1.0, "cond").run) == (1, 2)


def test_image_to_image_begins_in_the_middle() -> None:
    scheduler = Scheduler()
    clock = RunClock(scheduler=scheduler)
    scheduler.set_timesteps(10, begin=6)
    calls = []
    for _ in range(4):
        calls.append(locate(clock, 0.5, "cond"))
        scheduler.step()
    assert [(call.step, call.steps) for call in calls] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_unnamed_branches_of_a_pipeline_are_numbered_at_every_step() -> None:
    scheduler = Scheduler()
    clock = RunClock(scheduler=scheduler)
    scheduler.set_timesteps(3)
    branches = []
    for calls_a_step in (2, 1, 2):  # guidance pauses
        branches.append([locate(clock, 0.5).branch for _ in range(calls_a_step)])
        scheduler.step()
    assert branches == [["default", "call 2"], ["default"], ["default", "call 2"]]


@pytest.mark.parametrize("branch", [None, "cond"])
def test_a_transformer_that_is_called_past_the_pipelines_scheduler(branch: str | None) -> None:
    scheduler = Scheduler()
    scheduler.set_timesteps(5)
    clock = RunClock(scheduler=scheduler)
    calls = [locate(clock, t, branch) for t in (1.0, 0.6, 0.3, 1.0, 0.6)]
    assert [(call.run, call.step) for call in calls] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    scheduler.set_timesteps(2)  # the pipeline is back
    assert locate(clock, 1.0, branch).run == 3
    scheduler.step()
    assert (locate(clock, 0.5, branch).run, locate(clock, 0.5, "other").step) == (3, 1)


def test_what_the_context_announces_counts_most() -> None:
    clock = RunClock(scheduler=Scheduler())
    calls = [
        locate(clock, 1.0, branch, step_index=step, num_inference_steps=2)
        for step in (0, 1, 0)
        for branch in ("cond", "uncond")
    ]
    assert [(call.run, call.step, call.steps) for call in calls[::2]] == [(1, 0, 2), (1, 1, 2), (2, 0, 2)]


def test_hooks_within_share_the_call_and_an_exception_ends_the_run() -> None:
    clock = RunClock()
    kwargs = {"hidden_states": torch.zeros(1, 4, 2), "timestep": torch.tensor([1.0])}
    with clock.call(MODULE, None, kwargs) as outer, clock.call(MODULE, None, kwargs) as inner:
        assert inner is outer
    with pytest.raises(KeyboardInterrupt), clock.call(MODULE, None, {**kwargs, "timestep": torch.tensor([0.9])}):
        raise KeyboardInterrupt
    assert locate(clock, 0.8).run == 2


def test_forward_arguments_by_name() -> None:
    class Model(nn.Module):
        def forward(self, hidden_states: Any, timestep: Any = None, **extra: Any) -> None: ...

    assert bind_forward(Model(), (1,), {"timestep": 2, "other": 3}) == {"hidden_states": 1, "timestep": 2, "other": 3}
    assert bind_forward(Model(), (), {"hidden_states": 1}) == {"hidden_states": 1}


def texts_at(clock: RunClock, levels: list[float], branch: str | None = None) -> list[DenoisingCall]:
    """A call at each level with prompt embeddings of its own, all of them held."""
    calls, held = [], []
    for level in levels:
        text = torch.zeros(1, 3, 2)
        held.append(text)
        context = None
        if branch is not None:
            context = SimpleNamespace(name=branch, step_index=None, num_inference_steps=None)
        kwargs = {"hidden_states": torch.zeros(1, 4, 2), "timestep": torch.tensor([level])}
        with clock.call(MODULE, context, {**kwargs, "encoder_hidden_states": text}) as call:
            calls.append(call)
    return calls


@pytest.mark.parametrize("branch", [None, "cond"])
def test_new_prompt_embeddings_at_every_step_are_said_once(branch: str | None) -> None:
    said: list[str] = []
    calls = texts_at(RunClock(say=said.append), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5], branch)
    assert [call.step for call in calls] == [0] * 6, "each counts as a run of its own"
    assert len(said) == 1 and "dittocache.request" in said[0]


def test_requests_that_begin_one_after_the_other_are_no_mistake() -> None:
    said: list[str] = []
    texts_at(RunClock(say=said.append), [1.0] * 8)
    with request("a"):
        calls = texts_at(RunClock(say=said.append), [1.0, 0.8, 0.6, 0.4, 0.2])
    assert [call.step for call in calls] == list(range(5))
    assert not said
