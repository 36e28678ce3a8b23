"""TeaCache on a diffusers transformer: carries out the gate's decisions, step by step and branch by branch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.hooks.hooks import ModelHook
from torch import nn

from dittocache.errors import StepCacheError
from dittocache.families.run_clock import BranchListener, DenoisingCall, RunClock, bind_forward
from dittocache.teacache.gates import Gate, StepView
from dittocache.teacache.outputs import sample_of, with_sample
from dittocache.teacache.policy import Decision, skippable_steps
from dittocache.teacache.prediction import Prediction, StackPass, noise_sample
from dittocache.teacache.ranks import OverRanks, context_parallel, over_ranks
from dittocache.teacache.stack import BlockStack

logger = logging.getLogger(__name__)

HOOK_NAME = "dittocache_teacache"
NOTHING_KEPT = "this branch has nothing to predict from yet"


@dataclass(frozen=True)
class StepCache:
    """How a run is cached: what is made anew for each run.

    Attributes:
        make_gate: the gate of a branch, or of all branches.
        make_prediction: of each branch.
        shared_gate: one gate decides for all CFG branches.
        enabled: False where the settings ask for every step; the transformer is then left alone.
        never_skipped: what to do about a run in which no step was skipped, for the user.
    """

    make_gate: Callable[[], Gate]
    make_prediction: Callable[[], Prediction]
    shared_gate: bool
    enabled: bool
    never_skipped: str


@dataclass
class _Branch:
    """What one CFG branch keeps within a run."""

    gate: Gate
    prediction: Prediction


@dataclass
class _Run:
    """What a denoising run keeps."""

    branches: dict[str, _Branch] = field(default_factory=dict)
    gate: Gate | None = None
    computed: int = 0
    skipped: int = 0


class TeaCacheHook(ModelHook):  # type: ignore[misc]  # diffusers counts as Any
    """Skips the block stack where the gate says so.

    A computed step returns what the forward within returns, untouched. A skipped step returns noise tokens only,
    `(B, N, C)`: the part of the output that pipelines use. Where some rows of a batch are computed and others are not,
    the forward runs on the former alone.

    Args:
        cache: gate and prediction.
        stack: how to run the model around its blocks.
        clock: tells runs, branches and steps apart; shared with other hooks on the same transformer.
        say: takes a remark for the user, at most once each.
    """

    _is_stateful = True

    def __init__(
        self,
        cache: StepCache,
        stack: BlockStack,
        clock: RunClock,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        super().__init__()
        self.branch_listener = BranchListener()
        self._cache = cache
        self._stack = stack
        self._clock = clock
        self._say = say
        self._said: set[str] = set()
        self._runs: dict[int, _Run] = {}
        self._parallel: Any = None
        self._over_ranks: OverRanks | None = None

    @property
    def bytes_held(self) -> int:
        """Device memory of predictions and gates."""
        branches = [branch for run in self._runs.values() for branch in run.branches.values()]
        gates = {id(branch.gate): branch.gate for branch in branches}.values()
        return sum(gate.bytes_held for gate in gates) + sum(branch.prediction.bytes_held for branch in branches)

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when the hook is registered."""
        self._stack.attach(module)
        self._parallel, self._over_ranks = context_parallel(module), over_ranks(module)
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers (which spells it so) when the hook is removed."""
        self._end_runs()
        self._stack.detach()
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget everything; called by diffusers at the end of a pipeline's call."""
        self._end_runs()
        self._clock.end_run()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers in place of the transformer's forward."""
        if context_parallel(module) is not self._parallel:
            raise StepCacheError(
                f"{type(module).__name__} was made context-parallel while TeaCache was on: TeaCache would see the "
                "tokens of one rank only. Call enable_parallelism first, then put TeaCache on"
            )
        forward_kwargs = bind_forward(module, args, kwargs)
        with self._clock.call(module, self.branch_listener.heard, forward_kwargs) as call:
            if call.run not in self._runs:
                self._end_runs(but=self._clock.runs_under_way)
                self._begin_run(call)
            try:
                return self._step(module, call, forward_kwargs)
            except BaseException:
                self._runs.pop(call.run, None)  # a step that was cut short leaves state that fits no step
                raise

    def _step(self, module: nn.Module, call: DenoisingCall, forward_kwargs: dict[str, Any]) -> Any:
        run = self._runs[call.run]
        branch = self._branch(run, call.branch)
        rows = self._stack.samples(forward_kwargs)
        extract = partial(self._stack.extract, module, forward_kwargs, call.layout)
        latents = partial(self._stack.latents, forward_kwargs, call.layout)
        step = StepView(call, rows, self._clock, extract, self._over_ranks, latents)
        decisions = branch.gate.decide(step)
        must = self._stack.must_run(forward_kwargs)
        needed = [row for row in range(rows) if must or decisions[row].compute or not branch.prediction.ready(row)]
        self._report(call, decisions, needed)
        if not needed:
            run.skipped += 1
            return self._predicted(step, branch)
        run.computed += 1
        part = self._stack.rows(forward_kwargs, needed) if len(needed) < rows else None
        if part is None or not all(branch.prediction.ready(row) for row in range(rows)):
            needed, part = list(range(rows)), forward_kwargs
        output, passed = self._stack.compute(module, part, call.layout, step.context, self.fn_ref.original_forward)
        if not self._cache.enabled or self._is_last(call):  # nothing that is kept would be read
            return self._assembled(step, branch, output, passed, needed)
        sigma = self._sigma(step, branch)
        value = branch.prediction.value(passed, output, sigma, partial(step.latents_of, needed))
        branch.gate.observe(step, branch.prediction, value, needed)
        whole = self._assembled(step, branch, output, passed, needed)
        branch.prediction.observe(value, sigma, output, needed)
        return whole

    def _predicted(self, step: StepView, branch: _Branch) -> Any:
        return branch.prediction.predict(self._sigma(step, branch), step.context, step.latents)

    def _assembled(
        self, step: StepView, branch: _Branch, output: Any, passed: StackPass | None, computed: Sequence[int]
    ) -> Any:
        """The computed rows among the predicted ones; `output` itself where all rows were computed."""
        if len(computed) == step.rows:
            return output
        predicted = sample_of(self._predicted(step, branch))
        found = noise_sample(passed, output)
        index = torch.tensor(list(computed), device=found.device)
        return with_sample(output, predicted.index_copy(0, index, found.to(predicted.dtype)))

    def _report(self, call: DenoisingCall, decisions: Sequence[Decision], needed: Sequence[int]) -> None:
        """For the trace: the decision of the first row that is computed, or of the first one."""
        telling = decisions[needed[0] if needed else 0]
        call.computed = bool(needed)
        call.distance = max((one.distance for one in decisions if one.distance is not None), default=None)
        call.cause = NOTHING_KEPT if needed and not telling.compute else telling.cause
        call.rows, call.rows_computed = len(decisions), len(needed)

    def _sigma(self, step: StepView, branch: _Branch) -> float:
        """Asked for only where something depends on it: it may have to be read from the device."""
        return step.sigma if branch.prediction.needs_sigma else 0.0

    def _branch(self, run: _Run, name: str) -> _Branch:
        if name not in run.branches:
            if run.gate is None or not self._cache.shared_gate:
                run.gate = self._cache.make_gate()
            run.branches[name] = _Branch(run.gate, self._cache.make_prediction())
        return run.branches[name]

    def _is_last(self, call: DenoisingCall) -> bool:
        return call.steps is not None and call.step >= call.steps - 1

    def _begin_run(self, call: DenoisingCall) -> None:
        self._runs[call.run] = _Run()
        if not self._cache.enabled:
            return
        gate = self._cache.make_gate()
        if call.steps is None:
            self._say_once(
                "TeaCache does not know the number of steps, so the last step may be skipped; "
                "set num_inference_steps in its configuration, or apply it to the pipeline"
            )
        elif skippable_steps(gate.limits, call.steps, gate.needs_steps) == 0:
            first = max(gate.limits.ret_steps, gate.needs_steps)
            self._say_once(
                f"TeaCache can skip none of {call.steps} steps: the first {first} and the last "
                f"{gate.limits.cutoff_steps} are always computed. For few steps use the reference KV cache"
            )

    def _end_runs(self, but: Collection[int] = ()) -> None:
        for number in [number for number in self._runs if number not in but]:
            run = self._runs.pop(number)
            if self._cache.enabled and run.skipped == 0 and run.computed > 2 * len(run.branches):
                self._say_once(
                    f"TeaCache skipped none of {run.computed} calls of the transformer: {self._cache.never_skipped}"
                )

    def _say_once(self, remark: str) -> None:
        if remark not in self._said:
            self._said.add(remark)
            self._say(remark)
