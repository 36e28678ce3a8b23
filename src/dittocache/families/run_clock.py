"""Where in a denoising run a call of the transformer stands: the run, the CFG branch, the step.

diffusers pipelines name the branch (`transformer.cache_context("cond")`) but pass no step. With a pipeline at hand
the step is read from its scheduler, on the host. A bare transformer's steps are told apart by their timesteps, at the
price of one read from the device a call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.hooks.hooks import StateManager
from torch import nn

from dittocache.families.base import TokenLayout, TransformerAdapter

DEFAULT_BRANCH = "default"


class BranchListener(StateManager):  # type: ignore[misc]  # diffusers counts as Any
    """Hears the branch that a pipeline announces through `cache_context`; an attribute of a stateful hook."""

    def __init__(self) -> None:
        super().__init__(None)

    @property
    def heard(self) -> Any:
        """diffusers' context (`name`, `step_index`, `num_inference_steps`, ...), or None outside of one."""
        return self._context


@dataclass
class DenoisingCall:
    """One call of the transformer: where it stands, and what the caches did about it.

    Attributes:
        run: counts denoising runs; state of an earlier run is worthless.
        branch: `cond`, `uncond`, or `default` where no name was given.
        step: counts from 0 within the run.
        steps: number of steps of the run, None where nobody knows.
        layout: noise and reference tokens; None for a model that no family knows.
        computed: False where the step cache skipped the blocks.
        cause: why it was computed or skipped, in words.
        distance: relative L1 distance to the step before, where it was measured.
        references: `computed` or `reused`, where the reference cache is on.
        rows, rows_computed: samples in the batch, and those of them that were computed.
    """

    run: int
    branch: str
    step: int
    steps: int | None
    layout: TokenLayout | None
    computed: bool = True
    cause: str = ""
    distance: float | None = None
    references: str | None = None
    rows: int = 1
    rows_computed: int = 1


class RunClock:
    """Locates every call of one transformer. The outermost hook's call is located; hooks within share it.

    Args:
        adapter: the model's transformer side, None for a model that only has an extractor.
        scheduler: the pipeline's, None for a bare transformer.
        num_inference_steps: where the scheduler cannot tell.
    """

    def __init__(
        self, adapter: TransformerAdapter | None = None, scheduler: Any = None, num_inference_steps: int | None = None
    ) -> None:
        self._adapter = adapter
        self._scheduler = scheduler
        self._steps = num_inference_steps
        self._current: DenoisingCall | None = None
        self._run = 0
        self._read: object = None
        self._levels: list[float] = []
        self._levels_by_hand = (math.nan, math.nan)
        self._forget()

    @contextmanager
    def call(self, module: nn.Module, announced: Any, forward_kwargs: Mapping[str, Any]) -> Iterator[DenoisingCall]:
        """The call that is about to happen; an exception in it ends the run."""
        if self._current is not None:
            yield self._current
            return
        self._current = self._locate(module, announced, forward_kwargs)
        try:
            yield self._current
        except BaseException:
            self.end_run()
            raise
        finally:
            self._current = None

    def end_run(self) -> None:
        """The next call begins a new run, whatever its timestep."""
        self._forget()

    def sigmas(self) -> tuple[float, float]:
        """Noise level of the call that is going on, and the one that the solver goes on to; timesteps in [0, 1].

        From the scheduler's timesteps, read once a run. Of a transformer called by hand only the first is known; the
        next one is taken to be as far away as the one before.
        """
        timesteps: Any = getattr(self._scheduler, "timesteps", None)
        if timesteps is not None and timesteps is self._marker and not self._scheduler_idle:
            if self._read is not timesteps:
                longest = self._scheduler.config.num_train_timesteps
                levels = (cast(torch.Tensor, timesteps) / longest).tolist()
                self._read, self._levels = timesteps, [*levels, 0.0]
            return self._levels[self._index], self._levels[self._index + 1]
        now = _value(self._timestep)
        if now != self._levels_by_hand[0]:
            self._levels_by_hand = (now, self._levels_by_hand[0] if self._step else now)
        return now, max(0.0, 2 * now - self._levels_by_hand[1])

    def _forget(self) -> None:
        self._fresh = True
        self._signature: object = None
        self._timestep: Any = None
        self._marker: object = None
        self._index = 0
        self._first_index = 0
        self._step = 0
        self._seen: list[str] = []
        self._scheduler_idle = False
        self._levels_by_hand = (math.nan, math.nan)

    def _locate(self, module: nn.Module, announced: Any, forward_kwargs: Mapping[str, Any]) -> DenoisingCall:
        layout = None if self._adapter is None else self._adapter.token_layout(module, forward_kwargs)
        hidden_states = forward_kwargs.get("hidden_states")
        signature: object = layout
        if isinstance(hidden_states, torch.Tensor):
            signature = (hidden_states.shape, hidden_states.dtype, hidden_states.device, layout)
        name = None if announced is None else announced.name
        timestep = forward_kwargs.get("timestep")
        changed = self._fresh or signature != self._signature
        place = self._place(announced)
        if place is None:
            new_run, sibling, steps = self._by_timestep(name, timestep, changed)
        else:
            new_run, sibling, steps = self._by_index(name, timestep, changed, *place)
        if new_run:
            self._run += 1
            self._seen = []
            self._fresh = False
        branch = name or (f"call {len(self._seen) + 1}" if sibling and self._seen else DEFAULT_BRANCH)
        self._seen.append(branch)
        self._signature = signature
        self._timestep = timestep
        return DenoisingCall(self._run, branch, self._step, steps, layout)

    def _place(self, announced: Any) -> tuple[object, int, int | None] | None:
        """(what stays the same within a run, index of the step, number of steps), where someone says so."""
        if announced is not None and announced.step_index is not None:
            return None, int(announced.step_index), announced.num_inference_steps or self._steps
        index = getattr(self._scheduler, "step_index", None)
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is None or not hasattr(self._scheduler, "step_index"):
            return None
        if timesteps is self._marker and self._scheduler_idle:
            return None
        if index is None:  # before the first step of a run
            index = getattr(self._scheduler, "begin_index", None) or 0
        # set_timesteps() makes a new tensor for every run. It is kept, so its identity is not used again.
        return timesteps, int(index), len(timesteps)

    def _by_index(
        self, name: str | None, timestep: Any, changed: bool, marker: object, index: int, steps: int | None
    ) -> tuple[bool, bool, int | None]:
        """(a new run?, an unnamed branch beside others of this step?, number of steps) from the announced index."""
        again = index == self._index and (name in self._seen if name else bool(self._seen))
        new_run = changed or marker is not self._marker or index < self._index
        if not new_run and again:
            if marker is not None and _value(timestep) != _value(self._timestep):
                # The transformer is called by hand: its timestep moves, the pipeline's scheduler does not.
                self._scheduler_idle = True
                return self._by_timestep(name, timestep, changed)
            new_run = name is not None  # the same place and branch once more: an interrupted run starts again
        if new_run:
            self._first_index = index
        if new_run or index != self._index:
            self._seen = []
        self._marker, self._index, self._scheduler_idle = marker, index, False
        self._step = index - self._first_index
        return new_run, name is None, None if steps is None else steps - self._first_index

    def _by_timestep(self, name: str | None, timestep: Any, changed: bool) -> tuple[bool, bool, int | None]:
        """The same from timesteps, which fall from step to step within a run."""
        now = _value(timestep)
        before = now if changed else _value(self._timestep)
        again = name in self._seen if name else bool(self._seen)
        # Pipelines that name no branch (FluxKontextPipeline) call once a branch at every timestep. By hand an unnamed
        # second call at the same timestep is a restart: taking it for a branch could reuse state of another picture.
        sibling = name is None and self._scheduler is not None and now == before
        new_run = changed or now > before or (now == before and again and not sibling)
        if not new_run and now < before:
            self._step += 1
            self._seen = []
            new_run = self._steps is not None and self._step >= self._steps
        if new_run:
            self._step = 0
        return new_run, sibling, self._steps


def bind_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments of `module.forward` by name."""
    if not args:
        return dict(kwargs)
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:  # without self
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def _value(timestep: Any) -> float:
    """The first timestep of a batch; NaN where there is none, which equals nothing and is no new run."""
    if timestep is None:
        return float("nan")
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
