"""The step caches that are compared, each with the values of its own main knob, and fewer plain steps beside them.

The values lie around 1.5x, 2x and 2.5x for the bundled model at 28 steps; with more steps neighbours lie closer
together, and thresholds are lowered as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import step_peers
from dittocache.quality.calibration.recording import Subject
from dittocache.quality.tuning.settings import spread
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.profile import Calibration

FEWER = "fewer plain steps"
SPEC = "TeaCache, spec coefficients"
PUBLISHED_THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
TUNED_SPEEDS = (1.5, 2.0, 2.5)


@dataclass(frozen=True)
class Setting:
    """A method at one value of its knob; `steps` where it takes other steps than the uncached run."""

    method: str
    knob: float
    cache: Callable[[Any], AbstractContextManager[Any]]
    steps: int | None = None
    ours: bool = False


Calibrations = Callable[[], Mapping[Subject, Calibration]]
"""Gives the polynomials of the distance gate, when they are first needed."""
Choices = Callable[[], Mapping[float, TeaCacheConfig]]
"""Gives what `tune` chooses for each of `TUNED_SPEEDS`, when it is first needed."""


def all_settings(steps: int, guided: bool, calibrations: Calibrations, choices: Choices) -> list[Setting]:
    """Every method over the range of its knob, for runs of `steps` steps, with or without guidance."""
    ours = [*our_settings(steps, calibrations), *tuned_settings(choices)]
    return [*fewer_steps(steps), *ours, *peer_settings(steps, guided)]


def fewer_steps(steps: int) -> Iterator[Setting]:
    """Plain runs with fewer steps."""
    for speed in (1.45, 2.0, 2.6):
        yield Setting(FEWER, round(steps / speed), lambda pipe: nullcontext(), round(steps / speed))


def our_settings(steps: int, calibrations: Calibrations) -> Iterator[Setting]:
    """The distance gate with the spec's polynomial and with the model's own, the error gate, fixed schedules."""
    finer = step_peers.CHOSEN_AT / steps
    published = PUBLISHED_THRESHOLDS if steps == step_peers.CHOSEN_AT else PUBLISHED_THRESHOLDS[:1]  # the cap decides
    for threshold in (_short(0.03 * finer), _short(0.08 * finer), *published):
        yield _ours(SPEC, threshold, rel_l1_thresh=threshold)
    for threshold in (_short(one * finer) for one in (0.05, 0.1, 0.16)):
        yield _calibrated("residual", "residual", threshold, calibrations)
    for threshold in (_short(one * finer) for one in (0.015, 0.03, 0.05)):
        yield _calibrated("output_linear", "output", threshold, calibrations)
    for prediction in ("residual_linear", "output_linear"):
        for tolerance in (_short(one * finer**2) for one in (0.0003, 0.0006, 0.001, 0.0025, 0.006)):
            chosen = {"gate": "error", "error_tolerance": tolerance, "prediction": prediction}
            yield _ours(f"error gate, {prediction}", tolerance, **chosen)
    for tolerance in (_short(one * finer**2) for one in (0.00015, 0.0003, 0.0006, 0.0012, 0.0025, 0.005)):
        chosen = {"gate": "error", "error_tolerance": tolerance, "prediction": "noise_linear"}
        yield _ours("error gate, noise_linear", tolerance, **chosen)
    for name, power, prediction in (
        ("even schedule, output_linear", 1.0, "output_linear"),
        ("schedule closer late, output_linear", 1.6, "output_linear"),
        ("schedule closer late, noise_linear", 1.6, "noise_linear"),
    ):
        for count in dict.fromkeys(round(steps / speed) for speed in (1.5, 2.0, 2.6, 3.1)):
            computed = spread(steps, count, power)
            yield _ours(name, len(computed), gate="schedule", schedule=computed, prediction=prediction)


def tuned_settings(choices: Choices) -> Iterator[Setting]:
    """What `dittocache tune` chooses; its knob is the speed-up that was asked for."""
    for speed in TUNED_SPEEDS:
        yield Setting("tuned", speed, lambda pipe, s=speed: cached(pipe, choices()[s]), ours=True)


def peer_settings(steps: int, guided: bool) -> Iterator[Setting]:
    """Other projects' caches."""
    for name, (peer, knobs) in step_peers.peers(steps, guided).items():
        for knob in knobs:
            yield Setting(name, knob, lambda pipe, p=peer, k=knob: p(pipe, k, steps))


def _ours(method: str, knob: float, **settings: Any) -> Setting:
    config = TeaCacheConfig.model_validate(settings)
    return Setting(method, knob, lambda pipe: cached(pipe, config), ours=True)


def _calibrated(prediction: str, subject: Subject, threshold: float, calibrations: Calibrations) -> Setting:
    def cache(pipe: Any) -> AbstractContextManager[Any]:
        fit = calibrations()[subject]
        settings = {"coefficients": fit.coefficients, "fitted_range": fit.fitted_range, "prediction": prediction}
        return cached(pipe, TeaCacheConfig.model_validate({"rel_l1_thresh": threshold, **settings}))

    return Setting(f"distance gate, calibrated, {prediction}", threshold, cache, ours=True)


def _short(knob: float) -> float:
    return float(f"{knob:.2g}")
