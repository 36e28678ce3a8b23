"""What the distance gate reads in a run, beside the true change of what is predicted from it.

The gate that ships is asked at every step and every step is computed, so that the numbers are the ones it will decide
on: noise tokens, float32, relative to the step before. The last step is left out: it is always computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from diffusers.hooks.hooks import HookRegistry

from dittocache.families.denoiser import find_denoiser, remove_hook
from dittocache.teacache.adapter import TeaCacheAdapter
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.gates import Alone, DistanceGate, StepView
from dittocache.teacache.hook import StepCache
from dittocache.teacache.policy import Decision, GatePolicy
from dittocache.teacache.prediction import Latents, Prediction, StackPass, unknown
from dittocache.teacache.signal import read, relative_distance

HOOK_NAME = "dittocache_calibration"  # its own, so that a session of caches may stand around it

Subject = Literal["residual", "output"]
SUBJECTS: tuple[Subject, Subject] = ("residual", "output")

_EVERY_STEP = GatePolicy(threshold=1e-9, coefficients=(1.0,))  # reached whatever the distance


@dataclass(frozen=True)
class Point:
    """A step of one branch and sample: the signal's distance to the step before, and the change of what is predicted.

    Attributes:
        distance: what the gate reads.
        residual, output: relative change of the blocks' residual and of the model's output since the step before.
    """

    step: int
    branch: str
    distance: float
    residual: float
    output: float

    def change(self, subject: Subject) -> float:
        """The change of what is predicted."""
        return self.residual if subject == "residual" else self.output


@dataclass
class Recording:
    """Fills while the pipeline runs.

    Attributes:
        steps: of the run; None where nobody knows.
        tokens: noise tokens of a picture; None for a model that no family knows.
        branches: of classifier-free guidance.
    """

    points: list[Point] = field(default_factory=list)
    steps: int | None = None
    tokens: int | None = None
    branches: set[str] = field(default_factory=set)


@contextmanager
def recorded(target: Any, num_inference_steps: int | None = None) -> Iterator[Recording]:
    """Record all runs of a pipeline or transformer within the block; what it makes is the stock model's.

    Args:
        target: a diffusers pipeline with a transformer, or the transformer.
        num_inference_steps: of a run, where no scheduler tells: else a bare transformer's last step is recorded too.

    Raises StepCacheError where no extractor knows the model, ModelError where there is no transformer.
    """
    found = Recording()
    module = find_denoiser(target).module

    def record(cache: StepCache) -> StepCache:
        return replace(cache, make_gate=lambda: _RecordingGate(found), make_prediction=_BothValues)

    adapter = TeaCacheAdapter(TeaCacheConfig(gate="distance", num_inference_steps=num_inference_steps))
    hook = adapter.apply(target, say=lambda remark: None, refine=record)
    adapter.remove(target)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK_NAME)
    try:
        yield found
    finally:
        remove_hook(module, HOOK_NAME)


class _BothValues(Prediction):
    """Predicts nothing; gives the residual, and keeps the output of the same step beside it."""

    def __init__(self) -> None:
        super().__init__("residual")
        self._of_output = Prediction("output")
        self.output_value: torch.Tensor | None = None

    def value(
        self, passed: StackPass | None, output: Any, sigma: float = 0.0, latents: Latents = unknown
    ) -> torch.Tensor:
        self.output_value = self._of_output.value(passed, output)
        return super().value(passed, output)


class _RecordingGate:
    """The distance gate with every step computed, and a note of what it read."""

    def __init__(self, found: Recording) -> None:
        self._gate = DistanceGate(_EVERY_STEP, Alone())
        self.limits = self._gate.limits
        self.needs_steps = self._gate.needs_steps
        self._found = found
        self._decisions: Sequence[Decision] = ()
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # branch -> residual, output

    @property
    def bytes_held(self) -> int:
        return self._gate.bytes_held

    def decide(self, step: StepView) -> Sequence[Decision]:
        self._decisions = self._gate.decide(step)
        return self._decisions

    def observe(self, step: StepView, prediction: Prediction, value: torch.Tensor, rows: Sequence[int]) -> None:
        self._gate.observe(step, prediction, value, rows)
        assert isinstance(prediction, _BothValues) and prediction.output_value is not None
        call, now = step.call, (value, prediction.output_value)
        self._found.steps = call.steps
        self._found.tokens = None if call.layout is None else call.layout.noise
        self._found.branches.add(call.branch)
        if call.branch in self._before:
            before = self._before[call.branch]
            changes = [read(relative_distance(one, other)) for one, other in zip(now, before, strict=True)]
            for decision, residual, output in zip(self._decisions, *changes, strict=True):
                if decision.distance is not None:
                    self._found.points.append(Point(call.step, call.branch, decision.distance, residual, output))
        self._before[call.branch] = now
