"""Where in a denoising run a call of the transformer stands: the run, the CFG branch, the step.

diffusers pipelines name the branch (`transformer.cache_context("cond")`) but pass no step. With a pipeline at hand
the step is read from its scheduler, on the host. A bare transformer's steps are told apart by their timesteps, at the
price of one read from the device a call.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.hooks.hooks import StateManager
from torch import nn

from dittocache.families.active_adapters import adapters_of
from dittocache.families.transformer_side import StepAdapter, TokenLayout

logger = logging.getLogger(__name__)

DEFAULT_BRANCH = "default"
_CUT_SHORT = 3  # runs in a row that ended behind their first step before anything is said of it
_WAITING = 7  # runs beside the one whose turn it is; a broken-off run whose prompt somebody holds never ends by itself

_request: ContextVar[str | None] = ContextVar("dittocache_request", default=None)


@contextmanager
def request(name: str) -> Iterator[None]:
    """Calls of a transformer within belong to the request `name`.

    Runs that take turns on one transformer keep apart by themselves where each passes the same prompt embeddings at
    every step, as pipelines do. A loop that makes them anew at every step says with this which request it works for.
    """
    token = _request.set(name)
    try:
        yield
    finally:
        _request.reset(token)


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
        drift: how far their keys were from what was kept or predicted, 0-dim on the device, where it was measured.
        saved: share of the blocks' work that kept references spared a computed step.
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
    drift: torch.Tensor | None = None
    saved: float = 0.0
    rows: int = 1
    rows_computed: int = 1


@dataclass
class _Place:
    """How far one denoising run is. Several may be under way on one transformer and take turns."""

    request: str | None
    fresh: bool = True
    run: int = 0
    signature: object = None
    timestep: Any = None
    marker: object = None
    index: int = 0
    first_index: int = 0
    step: int = 0
    steps: int | None = None
    seen: list[str] = field(default_factory=list)
    scheduler_idle: bool = False
    levels_by_hand: tuple[float, float] = (math.nan, math.nan)
    texts: dict[str | None, weakref.ref[Any]] = field(default_factory=dict)  # prompt embeddings by announced branch

    def is_of(self, name: str | None, text: Any) -> bool:
        """Whether these very prompt embeddings were passed before in this run."""
        known = self.texts.get(name)
        return text is not None and known is not None and known() is text

    def is_of_another(self, name: str | None, text: Any) -> bool:
        """Whether this run got other prompt embeddings, which are still held: it may go on with them."""
        known = self.texts.get(name)
        before = None if known is None else known()
        return before is not None and before is not text

    @property
    def can_go_on(self) -> bool:
        """Whether another call may come: steps are left, and it has a name or its prompt embeddings are held."""
        ended = self.steps is not None and self.step >= self.steps - 1
        held = self.request is not None or any(text() is not None for text in self.texts.values())
        return held and not self.fresh and not ended


class RunClock:
    """Locates every call of one transformer. The outermost hook's call is located; hooks within share it.

    Args:
        adapter: the model's transformer side, None for a model that only has an extractor.
        scheduler: the pipeline's, None for a bare transformer.
        num_inference_steps: where the scheduler cannot tell.
        say: takes a remark for the user.
    """

    def __init__(
        self,
        adapter: StepAdapter | None = None,
        scheduler: Any = None,
        num_inference_steps: int | None = None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self._adapter = adapter
        self._scheduler = scheduler
        self._steps = num_inference_steps
        self._say = say
        self._cut_short = 0
        self._current: DenoisingCall | None = None
        self._runs = 0
        self._read: object = None
        self._levels: list[float] = []
        self._places: list[_Place] = []  # of runs that wait for their turn
        self._at = _Place(None)

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
            self._places = [place for place in self._places if place is not self._at]
            self._at = _Place(self._at.request)
            raise
        finally:
            self._current = None

    def end_run(self) -> None:
        """The next call begins a new run, whatever its timestep."""
        self._places, self._at = [], _Place(None)

    @property
    def runs_under_way(self) -> frozenset[int]:
        """The runs of which another call may come; the state of others is worthless."""
        return frozenset({self._at.run, *(place.run for place in self._places)})

    def sigmas(self) -> tuple[float, float]:
        """Noise level of the call that is going on, and the one that the solver goes on to; timesteps in [0, 1].

        From the scheduler's timesteps, read once a run. Of a transformer called by hand only the first is known; the
        next one is taken to be as far away as the one before.
        """
        at = self._at
        timesteps: Any = getattr(self._scheduler, "timesteps", None)
        if timesteps is not None and timesteps is at.marker and not at.scheduler_idle:
            if self._read is not timesteps:
                longest = self._scheduler.config.num_train_timesteps
                levels = (cast(torch.Tensor, timesteps) / longest).tolist()
                self._read, self._levels = timesteps, [*levels, 0.0]
            return self._levels[at.index], self._levels[at.index + 1]
        now = _value(at.timestep)
        if now != at.levels_by_hand[0]:
            at.levels_by_hand = (now, at.levels_by_hand[0] if at.step else now)
        return now, max(0.0, 2 * now - at.levels_by_hand[1])

    def _locate(self, module: nn.Module, announced: Any, forward_kwargs: Mapping[str, Any]) -> DenoisingCall:
        arguments = forward_kwargs if self._adapter is None else self._adapter.run_arguments(forward_kwargs)
        layout, signature = self._signed(module, forward_kwargs, arguments)
        name = None if announced is None else announced.name
        timestep, text = arguments.get("timestep"), arguments.get("encoder_hidden_states")
        self._turn_to(name, text, timestep)
        new_run, sibling = self._advance(name, timestep, signature, announced)
        at = self._at
        if new_run and self._adapter is not None:
            self._adapter.begin_run(forward_kwargs)
            layout, signature = self._signed(module, forward_kwargs, arguments)
        if new_run:
            self._runs += 1
            at.run, at.seen, at.fresh, at.texts = self._runs, [], False, {}
        branch = name or (f"call {len(at.seen) + 1}" if sibling and at.seen else DEFAULT_BRANCH)
        at.seen.append(branch)
        at.signature, at.timestep = signature, timestep
        if isinstance(text, torch.Tensor):
            at.texts[name] = weakref.ref(text)
        return DenoisingCall(at.run, branch, at.step, at.steps, layout)

    def _signed(
        self, module: nn.Module, forward_kwargs: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> tuple[TokenLayout | None, object]:
        """(layout of the tokens, what stays the same within a run)."""
        layout = None if self._adapter is None else self._adapter.token_layout(module, forward_kwargs)
        signature: object = (layout, adapters_of(module))
        hidden_states = arguments.get("hidden_states")
        if isinstance(hidden_states, torch.Tensor):
            # References may be left out of later steps; the layout counts them all the same.
            shape = hidden_states.shape if layout is None else (hidden_states.shape[0], *hidden_states.shape[2:])
            signature = (shape, hidden_states.dtype, hidden_states.device, signature)
        return layout, signature

    def _turn_to(self, name: str | None, text: Any, timestep: Any) -> None:
        """Find the run that this call belongs to: by the request that was named, else by its prompt embeddings."""
        wanted = _request.get()
        under_way = [place for place in (self._at, *self._places) if place is self._at or place.can_go_on]
        mine = [place for place in under_way if place.request == wanted]
        found = next((place for place in mine if place.is_of(name, text)), mine[0] if mine else _Place(wanted))
        # A pipeline that names no branch passes other embeddings for each of them.
        told_apart = wanted is None and (name is not None or self._scheduler is None)
        if told_apart and found.is_of_another(name, text):
            self._heed(found, timestep)
            found = _Place(None)
        others = [place for place in under_way if place is not found and place.can_go_on]
        self._at, self._places = found, others[:_WAITING]

    def _heed(self, before: _Place, timestep: Any) -> None:
        """Say it where new prompt embeddings at falling timesteps end one run after the other behind its first step."""
        falls = before.step == 0 and not before.fresh and _value(timestep) < _value(before.timestep)
        self._cut_short = self._cut_short + 1 if falls else 0
        if self._cut_short == _CUT_SHORT:
            self._say(
                "the transformer gets new prompt embeddings at every step, beside the former ones that are still held: "
                "each step counts as a run of its own, so none is skipped and no reference is reused. Pass the same "
                'tensors at every step, or say whose they are: `with dittocache.request("a"):`'
            )

    def _advance(self, name: str | None, timestep: Any, signature: object, announced: Any) -> tuple[bool, bool]:
        """Move the place by one call: (a new run?, an unnamed branch beside others of this step?)."""
        changed = self._at.fresh or signature != self._at.signature
        place = self._place(announced)
        if place is None:
            new_run, sibling, self._at.steps = self._by_timestep(name, timestep, changed)
        else:
            new_run, sibling, self._at.steps = self._by_index(name, timestep, changed, *place)
        return new_run, sibling

    def _place(self, announced: Any) -> tuple[object, int, int | None] | None:
        """(what stays the same within a run, index of the step, number of steps), where someone says so."""
        if announced is not None and announced.step_index is not None:
            return None, int(announced.step_index), announced.num_inference_steps or self._steps
        at = self._at
        index = getattr(self._scheduler, "step_index", None)
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is None or not hasattr(self._scheduler, "step_index"):
            return None
        if timesteps is at.marker and at.scheduler_idle:
            return None
        if index is None:  # before the first step of a run
            index = getattr(self._scheduler, "begin_index", None) or 0
        # set_timesteps() makes a new tensor for every run. It is kept, so its identity is not used again.
        return timesteps, int(index), len(timesteps)

    def _by_index(
        self, name: str | None, timestep: Any, changed: bool, marker: object, index: int, steps: int | None
    ) -> tuple[bool, bool, int | None]:
        """(a new run?, an unnamed branch beside others of this step?, number of steps) from the announced index."""
        at = self._at
        again = index == at.index and (name in at.seen if name else bool(at.seen))
        new_run = changed or marker is not at.marker or index < at.index
        if not new_run and again:
            if marker is not None and _value(timestep) != _value(at.timestep):
                # The transformer is called by hand: its timestep moves, the pipeline's scheduler does not.
                at.scheduler_idle = True
                return self._by_timestep(name, timestep, changed)
            new_run = name is not None  # the same place and branch once more: an interrupted run starts again
        if new_run:
            at.first_index = index
        if new_run or index != at.index:
            at.seen = []
        at.marker, at.index, at.scheduler_idle = marker, index, False
        at.step = index - at.first_index
        return new_run, name is None, None if steps is None else steps - at.first_index

    def _by_timestep(self, name: str | None, timestep: Any, changed: bool) -> tuple[bool, bool, int | None]:
        """The same from timesteps, which fall from step to step within a run."""
        at = self._at
        now = _value(timestep)
        before = now if changed else _value(at.timestep)
        again = name in at.seen if name else bool(at.seen)
        # Pipelines that name no branch (FluxKontextPipeline) call once a branch at every timestep. By hand an unnamed
        # second call at the same timestep is a restart: taking it for a branch could reuse state of another picture.
        sibling = name is None and self._scheduler is not None and now == before
        new_run = changed or now > before or (now == before and again and not sibling)
        if not new_run and now < before:
            at.step += 1
            at.seen = []
            new_run = self._steps is not None and at.step >= self._steps
        if new_run:
            at.step = 0
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
