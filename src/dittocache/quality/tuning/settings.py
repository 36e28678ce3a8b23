"""The settings that are tried: one knob a method, from mild to harsh."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dittocache.quality.calibration.recording import Subject
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.policy import even_refreshes
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.profile import Calibration

PLAIN = "fewer plain steps"
_VALUES = 24  # of a continuous knob
References = Literal["drift", "exact"]
_FEWEST_SHARE = 0.2  # of the steps: fewer are computed by no schedule


@dataclass(frozen=True)
class Setting:
    """One way to make a picture: with so many plain steps, with a step cache, a reference cache, or both.

    Attributes:
        method: what the settings of one sweep share.
        knob: what differs between them, in words.
        steps: denoising steps; None: those of the uncached run.
    """

    method: str
    knob: str
    steps: int | None = None
    teacache: TeaCacheConfig | None = None
    reference_kv: ReferenceKVConfig | None = None

    @cached_property
    def key(self) -> str:
        """The same for settings that make the same picture."""
        chosen = [cache for cache in (self.teacache, self.reference_kv) if cache is not None]
        caches: list[object] = [cache.model_dump(mode="json") for cache in chosen]
        return json.dumps([self.steps, *(caches or [None])], sort_keys=True)

    @property
    def label(self) -> str:
        return f"{self.method}, {self.knob}" if self.knob else self.method


UNCACHED = Setting("uncached", "")


@dataclass(frozen=True)
class Method:
    """A sweep: `settings` from the mildest to the harshest, so that speed grows and quality falls along it."""

    name: str
    settings: Sequence[Setting]


def all_methods(
    steps: int,
    calibration: Mapping[Subject, Calibration],
    knows_blocks: bool = True,
    references: References | None = None,
) -> list[Method]:
    """Every sweep for runs of `steps` steps: plain steps first, then every gate with the predictions that suit it.

    Args:
        calibration: of the distance gate, by what is predicted; without it that gate is left out.
        knows_blocks: whether the model has an extractor, so that the residual of its blocks can be predicted.
        references: what becomes of references whose keys and values are kept: they drift, and when to refresh them is
            searched too, alone and together with ways of skipping steps; or they are `exact`. None: there are none.
    """
    methods = [plain_steps(steps)]
    if steps >= 4:
        # The line of the output loses less in many unguided steps and mild settings, else that of the noise.
        methods += [error_gate(), error_gate("output_linear")]
        if knows_blocks:
            methods.append(error_gate("residual_linear"))
        methods += [even_schedule(steps), late_schedule(steps)]
        for prediction in ("residual", "output_linear"):
            subject: Subject = "output" if prediction.startswith("output") else "residual"
            if subject in calibration:
                methods.append(distance_gate(prediction, calibration[subject]))
    if references is not None:
        skipping = [error_gate(), late_schedule(steps)] if steps >= 4 else []
        if references == "drift":
            methods += [refreshed_references(steps), adaptive_references(steps)]
        else:
            methods.append(Method("references kept", [Setting("references kept", "", reference_kv=REFERENCES[-1])]))
        kept = REFERENCES if references == "drift" else REFERENCES[-1:]
        methods += [with_references(method, one) for method in skipping for one in kept]
    return [method for method in methods if method.settings]


def plain_steps(steps: int) -> Method:
    """No cache and fewer steps: the baseline that a cache has to beat."""
    counts = range(steps - 1, max(1, math.floor(_FEWEST_SHARE * steps)) - 1, -1)
    return Method(PLAIN, [Setting(PLAIN, f"{count} steps", count) for count in counts])


def error_gate(prediction: str | None = None) -> Method:
    """The gate that needs no calibration, with its usual prediction or another; its knob is `error_tolerance`."""
    name = "error gate" if prediction is None else f"error gate, {prediction}"
    return Method(
        name, [_cache(name, gate="error", prediction=prediction, error_tolerance=v) for v in _knob(1e-5, 5e-2)]
    )


def distance_gate(prediction: str, calibration: Calibration) -> Method:
    """The published gate with the model's own polynomial; its knob is `rel_l1_thresh`."""
    name = f"calibrated distance gate, {prediction}"
    fitted = {"coefficients": calibration.coefficients, "fitted_range": calibration.fitted_range}
    values = _knob(0.01, 2.0)
    return Method(
        name, [_cache(name, gate="distance", prediction=prediction, rel_l1_thresh=v, **fitted) for v in values]
    )


def even_schedule(steps: int) -> Method:
    """A fixed schedule of evenly spread computed steps."""
    return _schedules("even schedule", steps, 1.0)


def late_schedule(steps: int) -> Method:
    """A fixed schedule whose computed steps lie closer together towards the end."""
    return _schedules("schedule closer late", steps, 1.6)


REFERENCES = (ReferenceKVConfig(refresh=2), ReferenceKVConfig())
"""What ways of skipping steps are combined with: references refreshed at every second computed step, and as usual."""


def refreshed_references(steps: int) -> Method:
    """References refreshed at fewer and fewer steps, evenly spread; every step is computed."""
    name, settings = "references refreshed evenly", []
    for count in range(steps - 1, 0, -1):
        kept = ReferenceKVConfig(refresh=even_refreshes(steps, count))
        settings.append(Setting(name, f"{count} of {steps} refreshed", reference_kv=kept))
    return Method(name, settings)


def adaptive_references(steps: int) -> Method:
    """References refreshed when their keys are expected to have drifted; the knob is `drift_tolerance`."""
    name = "references refreshed by drift"
    tolerances = _knob(0.01, 1.0) if steps > 2 else []
    return Method(
        name,
        [
            Setting(
                name,
                f"drift_tolerance {tolerance:g}",
                reference_kv=ReferenceKVConfig(refresh="adaptive", drift_tolerance=tolerance),
            )
            for tolerance in tolerances
        ],
    )


def with_references(method: Method, kept: ReferenceKVConfig) -> Method:
    """A way of skipping steps, with references kept in the others."""
    name = f"{method.name}, references {kept.in_short}"
    settings = [Setting(name, one.knob, one.steps, one.teacache, kept) for one in method.settings]
    return Method(name, settings)


def spread(steps: int, computed: int, power: float) -> tuple[int, ...]:
    """`computed` of `steps` steps: the first two, the last, and the others spread between; `power` 1 spreads evenly.

    A line needs two steps to start from.
    """
    if computed >= steps:
        return tuple(range(steps))
    last, rest = steps - 1, computed - 2  # behind step 1
    places = {0, 1, last}
    for number in range(1, rest + 1):
        share = 1 - (1 - number / rest) ** power
        places.add(1 + round(share * (last - 1)))
    free = [step for step in range(last, 0, -1) if step not in places]
    return tuple(sorted([*places, *free[: max(0, computed - len(places))]]))


def _schedules(name: str, steps: int, power: float) -> Method:
    settings, seen = [], {tuple(range(steps))}
    for computed in range(steps - 1, max(3, math.floor(_FEWEST_SHARE * steps)) - 1, -1):
        schedule = spread(steps, computed, power)
        if schedule not in seen:
            seen.add(schedule)
            cache = TeaCacheConfig(gate="schedule", schedule=schedule)
            settings.append(Setting(name, f"{len(schedule)} of {steps} computed", teacache=cache))
    return Method(name, settings)


def _cache(method: str, **settings: object) -> Setting:
    cache = TeaCacheConfig.model_validate(settings)
    name = "error_tolerance" if cache.gate == "error" else "rel_l1_thresh"
    return Setting(method, f"{name} {getattr(cache, name):g}", teacache=cache)


def _knob(lowest: float, highest: float) -> list[float]:
    ratio = (highest / lowest) ** (1 / (_VALUES - 1))
    return [float(f"{lowest * ratio**number:.3g}") for number in range(_VALUES)]
