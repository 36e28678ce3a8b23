"""From settings to a gate and a prediction."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.error_policy import ErrorPolicy
from dittocache.teacache.gates import Alone, DistanceGate, ErrorGate, Gate, ScheduleGate, Together
from dittocache.teacache.hook import StepCache
from dittocache.teacache.policy import GatePolicy
from dittocache.teacache.prediction import Prediction, Subject
from dittocache.teacache.stack import BlockStack


def step_cache(config: TeaCacheConfig, policy: GatePolicy, stack: BlockStack) -> StepCache:
    """What `config` asks for; `policy` is its distance gate with the model's coefficients."""
    subject, _, line = config.chosen_prediction.partition("_")
    order = 1 if line else 0
    unite = Alone() if config.per_sample else Together()
    limits: dict[str, Any] = {
        "ret_steps": config.ret_steps,
        "cutoff_steps": config.cutoff_steps,
        "max_consecutive_skips": config.max_consecutive_skips,
    }

    def make_gate() -> Gate:
        if config.gate == "error":
            return ErrorGate(ErrorPolicy(config.error_tolerance, order, **limits), unite)
        if config.gate == "schedule":
            return ScheduleGate(config.schedule or (), policy, order)
        return DistanceGate(policy, unite, needs_steps=order + 1)

    advice = {
        "distance": f"rel_l1_thresh {config.rel_l1_thresh} is below the distance of neighbouring steps. Raise it, or "
        "calibrate the coefficients for this model",
        "error": f"error_tolerance {config.error_tolerance} is below the error of any skipped step. Raise it",
        "schedule": "the schedule lists them all",
    }
    return StepCache(
        make_gate,
        partial(Prediction, cast(Subject, subject), order, instead="output" if config.prediction is None else None),
        shared_gate=stack.signal_is_shared or config.gate != "distance",
        enabled=config.enabled,
        never_skipped=advice[config.gate],
    )
