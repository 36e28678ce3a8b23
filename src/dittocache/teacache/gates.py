"""The gates: what decides, row by row of a batch, whether a step is computed. They feed the pure policies with numbers.

A gate belongs to one run, and to one CFG branch or to all of them where one decision serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from dittocache.families.run_clock import DenoisingCall, RunClock
from dittocache.families.transformer_side import CacheContext
from dittocache.teacache.error_policy import ErrorPolicy, ErrorState, after_computed, decide_by_error
from dittocache.teacache.policy import (
    SCHEDULED,
    Decision,
    GatePolicy,
    GateState,
    Limits,
    decide,
    forced,
    forced_by_place,
)
from dittocache.teacache.prediction import Latents, Prediction, unknown
from dittocache.teacache.ranks import OverRanks
from dittocache.teacache.signal import read, relative_l1


class StepView:
    """One call of the transformer as a gate sees it; what costs something is worked out when it is asked for.

    Args:
        call: where in the run it stands.
        rows: samples in the batch.
        clock: knows the sigmas of the run.
        extract: takes the forward pass apart.
        over_ranks: averages numbers that were measured on a part of the tokens over all ranks; None: all are here.
        latents: gives the noisy latents `(B, N, C)` as the solver has them, or None.
    """

    def __init__(
        self,
        call: DenoisingCall,
        rows: int,
        clock: RunClock,
        extract: Callable[[], CacheContext],
        over_ranks: OverRanks | None = None,
        latents: Latents = unknown,
    ) -> None:
        self.latents = latents
        self.call = call
        self.rows = rows
        self.over_ranks = over_ranks
        self._clock = clock
        self._extract = extract
        self._context: CacheContext | None = None

    def context(self) -> CacheContext:
        """The forward pass taken apart, noise tokens only."""
        if self._context is None:
            self._context = self._extract()
        return self._context

    def latents_of(self, rows: Sequence[int]) -> torch.Tensor | None:
        """The latents of some rows, in this order; None where the model's input does not hold them."""
        whole = self.latents()
        return whole if whole is None or len(rows) == self.rows else whole[list(rows)]

    @cached_property
    def sigmas(self) -> tuple[float, float]:
        """Noise level of this step, and the one that the solver goes on to."""
        return self._clock.sigmas()

    @property
    def sigma(self) -> float:
        """Noise level of this step."""
        return self.sigmas[0]


class Gate(Protocol):
    """Decides on steps and learns from computed ones.

    Attributes:
        limits: first, last and consecutive steps, whatever is measured.
        needs_steps: steps that must be computed before one can be skipped.
    """

    limits: Limits
    needs_steps: int

    @property
    def bytes_held(self) -> int:
        """Device memory of what is kept."""
        ...

    def decide(self, step: StepView) -> Sequence[Decision]:
        """The decision for each row; asked again within the same step, it answers the same."""
        ...

    def observe(self, step: StepView, prediction: Prediction, value: torch.Tensor, rows: Sequence[int]) -> None:
        """Learn from computed rows; `value` is what `prediction` keeps of them. Called before it is kept."""
        ...


@dataclass(frozen=True)
class Alone:
    """A decision for each row."""

    def __call__(self, decisions: Sequence[Decision]) -> list[Decision]:
        return list(decisions)


@dataclass(frozen=True)
class Together:
    """One decision for the batch: computed as soon as one row needs it."""

    def __call__(self, decisions: Sequence[Decision]) -> list[Decision]:
        needed = next((one for one in decisions if one.compute), None)
        return list(decisions) if needed is None else [needed] * len(decisions)


Uniting = Alone | Together


class DistanceGate:
    """The spec's: rescaled distances of the modulated input are added up until they reach the threshold."""

    def __init__(self, policy: GatePolicy, unite: Uniting, needs_steps: int = 1) -> None:
        self.limits: Limits = policy
        self.needs_steps = needs_steps
        self._policy = policy
        self._unite = unite
        self._states: list[GateState] = []
        self._signal: torch.Tensor | None = None  # (B, N, D)
        self._signal_step = -1
        self._step = -1
        self._decisions: Sequence[Decision] = ()

    @property
    def bytes_held(self) -> int:
        """Bytes of the last step's signal."""
        return 0 if self._signal is None else self._signal.numel() * self._signal.element_size()

    def decide(self, step: StepView) -> Sequence[Decision]:
        """By the distance of this step's signal from the last one's; not measured where it can change nothing."""
        call = step.call
        if call.step == self._step:
            return self._decisions
        if len(self._states) != step.rows:
            self._states = [GateState()] * step.rows
        distances: Sequence[float | None] = [None] * step.rows
        free = [forced(self._policy, state, call.step, call.steps) is None for state in self._states]
        if any(free) and self._signal is not None:
            context = step.context()
            distances = relative_l1(context.modulated_input, self._signal, step.over_ranks)
            self._keep(context, call.step)
        decided = [
            decide(self._policy, state, distance, call.step, call.steps)
            for state, distance in zip(self._states, distances, strict=True)
        ]
        self._decisions = self._unite([decision for decision, _ in decided])
        self._states = [
            GateState() if decision.compute else state
            for decision, (_, state) in zip(self._decisions, decided, strict=True)
        ]
        self._step = call.step
        return self._decisions

    def observe(self, step: StepView, prediction: Prediction, value: torch.Tensor, rows: Sequence[int]) -> None:
        """Take the signal of a step on which no decision hung, behind the forward, where offloading hooks have brought
        the weights to the device."""
        if self._signal_step != step.call.step:
            self._keep(step.context(), step.call.step)

    def _keep(self, context: CacheContext, step: int) -> None:
        signal = context.modulated_input.detach()
        # A view would keep a larger tensor alive.
        self._signal = signal if signal._base is None else signal.clone()
        self._signal_step = step


class ErrorGate:
    """By how wrong the prediction was at the last computed step; one decision for all CFG branches.

    Guidance adds the branches up, so their errors should stand at the same steps; the worst branch decides.
    """

    def __init__(self, policy: ErrorPolicy, unite: Uniting) -> None:
        self.limits: Limits = policy
        self.needs_steps = policy.order + 2
        self._policy = policy
        self._unite = unite
        self._states: list[ErrorState] = []
        self._step = -1
        self._decisions: Sequence[Decision] = ()
        self._sigma = 0.0
        self._computed: dict[int, list[tuple[torch.Tensor, int] | None]] = {}  # row -> defects, a branch each

    bytes_held = 0  # of a few numbers

    def decide(self, step: StepView) -> Sequence[Decision]:
        """By the error that skipping would add up to."""
        call = step.call
        if call.step == self._step:
            return self._decisions
        if len(self._states) != step.rows:
            self._states = [ErrorState()] * step.rows
            self._computed = {}
        self._settle(step)
        decided = [decide_by_error(self._policy, state, *step.sigmas, call.step, call.steps) for state in self._states]
        self._decisions = self._unite([decision for decision, _ in decided])
        self._states = [
            ErrorState(state.computed, state.curvature) if decision.compute else state
            for decision, (_, state) in zip(self._decisions, decided, strict=True)
        ]
        self._step, self._sigma = call.step, step.sigma
        return self._decisions

    def observe(self, step: StepView, prediction: Prediction, value: torch.Tensor, rows: Sequence[int]) -> None:
        """Note the defect, to be read from the device when a decision hangs on it."""
        defects = prediction.defect(value, step.sigma, rows)
        for place, row in enumerate(rows):
            if self._decisions[row].compute:  # a branch that came in late may compute where the others skip
                self._computed.setdefault(row, []).append(None if defects is None else (defects, place))

    def _settle(self, step: StepView) -> None:
        """Take what the last computed step found into the states; read only where it counts."""
        if not self._computed:
            return
        call = step.call
        counts = any(
            forced_by_place(self._policy, state.skips, call.step, call.steps) is None for state in self._states
        )
        tensors = {id(one[0]): one[0] for found in self._computed.values() for one in found if one is not None}
        numbers: dict[int, list[float]] = {}
        if counts and tensors:
            defects = torch.cat(list(tensors.values()))
            together = iter(read(defects if step.over_ranks is None else step.over_ranks(defects)))
            numbers = {key: [next(together) for _ in tensor] for key, tensor in tensors.items()}
        for row, found in self._computed.items():
            known = [numbers[id(one[0])][one[1]] for one in found if one is not None and id(one[0]) in numbers]
            worst = max(known) if len(known) == len(found) else None
            self._states[row] = after_computed(self._policy, self._states[row], self._sigma, worst)
        self._computed = {}


class ScheduleGate:
    """Computes the steps of a list: a recorded trace played again, without a read from the device."""

    bytes_held = 0

    def __init__(self, computed: Collection[int], limits: Limits, order: int) -> None:
        self.limits = limits
        self.needs_steps = order + 1
        self._computed = frozenset(computed)

    def decide(self, step: StepView) -> Sequence[Decision]:
        """As listed; the first and last steps are computed all the same."""
        call = step.call
        forced = forced_by_place(self.limits, 0, call.step, call.steps)
        return [forced or Decision(call.step in self._computed, SCHEDULED)] * step.rows

    def observe(self, step: StepView, prediction: Prediction, value: torch.Tensor, rows: Sequence[int]) -> None:
        """Nothing to learn."""
