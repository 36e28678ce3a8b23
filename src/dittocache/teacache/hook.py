"""TeaCache on a diffusers transformer: carries out the policy's decisions, step by step and branch by branch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks.hooks import ModelHook
from torch import nn

from dittocache.families.base import CacheContext
from dittocache.families.run_clock import BranchListener, DenoisingCall, RunClock, bind_forward
from dittocache.teacache.policy import Decision, GatePolicy, GateState, decide, forced, skippable_steps
from dittocache.teacache.prediction import Prediction, ResidualReuse
from dittocache.teacache.signal import relative_l1
from dittocache.teacache.stack import BlockStack

logger = logging.getLogger(__name__)

HOOK_NAME = "dittocache_teacache"
NO_RESIDUAL = "this branch has nothing to reuse yet"


@dataclass
class _Gate:
    """The gate's state within a run: of one branch, or of all where their signal is the same."""

    state: GateState = field(default_factory=GateState)
    signal: torch.Tensor | None = None
    step: int = -1
    decision: Decision | None = None


@dataclass
class _Branch:
    """What one CFG branch keeps within a run."""

    gate: _Gate
    prediction: Prediction


class TeaCacheHook(ModelHook):  # type: ignore[misc]  # diffusers counts as Any
    """Skips the block stack where the policy says so.

    A computed step returns what the forward within returns, untouched. A skipped step returns noise tokens only,
    `(B, N, C)`: the part of the output that pipelines use.

    Args:
        policy: when to compute.
        stack: how to run the model around its blocks.
        clock: tells runs, branches and steps apart; shared with other hooks on the same transformer.
        make_prediction: what stands in for the blocks on a skipped step; one is made for each run and branch.
        say: takes a remark for the user, at most once each.
    """

    _is_stateful = True

    def __init__(
        self,
        policy: GatePolicy,
        stack: BlockStack,
        clock: RunClock,
        make_prediction: Callable[[], Prediction] = ResidualReuse,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        super().__init__()
        self.branch_listener = BranchListener()
        self._policy = policy
        self._stack = stack
        self._clock = clock
        self._make_prediction = make_prediction
        self._say = say
        self._said: set[str] = set()
        self._clear()

    def _clear(self) -> None:
        self._run = 0
        self._shared_gate = _Gate()
        self._branches: dict[str, _Branch] = {}
        self._computed = 0
        self._skipped = 0

    @property
    def bytes_held(self) -> int:
        """Device memory of residuals and signals."""
        gates = {id(branch.gate): branch.gate for branch in self._branches.values()}.values()
        signals = [gate.signal for gate in gates if gate.signal is not None]
        held = sum(signal.numel() * signal.element_size() for signal in signals)
        return held + sum(branch.prediction.bytes_held for branch in self._branches.values())

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when the hook is registered."""
        self._stack.attach(module)
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers (which spells it so) when the hook is removed."""
        self._end_run()
        self._stack.detach()
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget everything; called by diffusers at the end of a pipeline's call."""
        self._end_run()
        self._clock.end_run()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers in place of the transformer's forward."""
        forward_kwargs = bind_forward(module, args, kwargs)
        with self._clock.call(module, self.branch_listener.heard, forward_kwargs) as call:
            if call.run != self._run:
                self._end_run()
                self._begin_run(call)
            try:
                return self._step(module, call, forward_kwargs)
            except BaseException:
                self._clear()  # a step that was cut short leaves state that fits no step
                raise

    def _step(self, module: nn.Module, call: DenoisingCall, forward_kwargs: dict[str, Any]) -> Any:
        branch = self._branch(call.branch)
        gate, context = branch.gate, None
        if gate.step != call.step or gate.decision is None:
            decision, context = self._decide(module, gate, call, forward_kwargs)
            first_look = True
        else:  # another branch has decided this step
            decision, first_look = gate.decision, False
        call.distance, call.cause = decision.distance, decision.cause
        if not decision.compute and branch.prediction.ready:
            call.computed = False
            self._skipped += 1
            context = context or self._stack.extract(module, forward_kwargs, call.layout)
            return branch.prediction.predict(context)
        if not decision.compute:
            call.cause = NO_RESIDUAL
        self._computed += 1
        forward = self.fn_ref.original_forward
        output, passed = self._stack.compute(module, forward_kwargs, call.layout, context, forward)
        if self._policy.threshold <= 0 or self._is_last(call):  # nothing that is kept would be read
            return output
        branch.prediction.observe(passed)
        # Measured behind the forward where no decision hung on it: offloading hooks bring weights to the device there.
        if first_look and context is None:
            gate.signal = _kept_signal(self._stack.extract(module, forward_kwargs, call.layout))
        return output

    def _decide(
        self, module: nn.Module, gate: _Gate, call: DenoisingCall, forward_kwargs: dict[str, Any]
    ) -> tuple[Decision, CacheContext | None]:
        context, distance = None, None
        if forced(self._policy, gate.state, call.step, call.steps) is None and gate.signal is not None:
            context = self._stack.extract(module, forward_kwargs, call.layout)
            distance = relative_l1(context.modulated_input, gate.signal)
            gate.signal = _kept_signal(context)
        decision, gate.state = decide(self._policy, gate.state, distance, call.step, call.steps)
        gate.step, gate.decision = call.step, decision
        return decision, context

    def _branch(self, name: str) -> _Branch:
        if name not in self._branches:
            gate = self._shared_gate if self._stack.signal_is_shared else _Gate()
            self._branches[name] = _Branch(gate, self._make_prediction())
        return self._branches[name]

    def _is_last(self, call: DenoisingCall) -> bool:
        return call.steps is not None and call.step >= call.steps - 1

    def _begin_run(self, call: DenoisingCall) -> None:
        self._run = call.run
        if self._policy.threshold <= 0:
            return
        if call.steps is None:
            self._say_once(
                "TeaCache does not know the number of steps, so the last step may be skipped; "
                "set num_inference_steps in its configuration, or apply it to the pipeline"
            )
        elif skippable_steps(self._policy, call.steps) == 0:
            self._say_once(
                f"TeaCache can skip none of {call.steps} steps: the first {self._policy.ret_steps} and the last "
                f"{self._policy.cutoff_steps} are always computed. For few steps use the reference KV cache"
            )

    def _end_run(self) -> None:
        if self._policy.threshold > 0 and self._skipped == 0 and self._computed > 2 * len(self._branches):
            self._say_once(
                f"TeaCache skipped none of {self._computed} calls of the transformer: rel_l1_thresh "
                f"{self._policy.threshold} is below the distance of neighbouring steps. Raise it, or calibrate the "
                "coefficients for this model"
            )
        self._clear()

    def _say_once(self, remark: str) -> None:
        if remark not in self._said:
            self._said.add(remark)
            self._say(remark)


def _kept_signal(context: CacheContext) -> torch.Tensor:
    """The modulated input for the next comparison; a copy, should it be a view that keeps a larger tensor alive."""
    signal = context.modulated_input.detach()
    return signal if signal._base is None else signal.clone()
