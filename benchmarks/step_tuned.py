"""What `dittocache tune` chooses for a speed-up, on edits that the comparison does not use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dittocache.quality.calibration.recording import Subject
from dittocache.quality.tuning.measurement import Ledger
from dittocache.quality.tuning.settings import Setting, all_methods
from dittocache.quality.tuning.target import Target
from dittocache.quality.tuning.tune import tune
from dittocache.sampling.generate import Picture
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.profile import Calibration
from step_methods import TUNED_SPEEDS
from step_runs import Bench

SEARCHED, HELD_OUT = (48, 49, 50, 51), (52, 53)
"""Edits to search on and to verify with; the comparison is on those before them."""


@dataclass(frozen=True)
class Drawn:
    """A held-out edit of the bundled task; its noise depends on its number."""

    bench: Bench
    number: int

    @property
    def key(self) -> str:
        return f"edit-{self.number}"

    def make(self, setting: Setting) -> Picture:
        with cached(self.bench.pipe, setting.teacache) as trace:
            made = self.bench.make(self.number, setting.steps)
        return Picture(made.picture, made.wall, trace)


def tuned(bench: Bench, calibrations: Mapping[Subject, Calibration], folder: Path) -> dict[float, TeaCacheConfig]:
    """The step cache of the best quality for each of `TUNED_SPEEDS`; what was measured is kept in `folder`."""
    ledger, methods = Ledger(folder), all_methods(bench.steps, calibrations)
    searched, held_out = ([Drawn(bench, number) for number in numbers] for numbers in (SEARCHED, HELD_OUT))
    found = {}
    for speed in TUNED_SPEEDS:
        choice = tune(Target.parse(f"speedup>={speed}"), "mean", methods, searched, held_out, ledger, timed=0).cache
        if choice is None or choice.setting.teacache is None:
            raise RuntimeError(f"tune found no step cache of {speed}x in runs of {bench.steps} steps")
        print(f"tuned for {speed}x: {choice.setting.label}", flush=True)
        found[speed] = choice.setting.teacache
    return found
