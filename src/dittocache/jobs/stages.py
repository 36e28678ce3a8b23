"""The stages of a run, in the order in which they may follow each other.

Each is a function of `(inputs: RunInputs, log: EventLog)` in a module of its own, imported only when it runs, and
runs as a process of its own (`dittocache.jobs.stage`), so that what it held is given back to the machine when it ends.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dittocache.events import EventLog

if TYPE_CHECKING:
    from dittocache.jobs.inputs import RunInputs


@dataclass(frozen=True)
class Stage:
    """One stage: `module.function` that carries it out, and what it does in the user's words."""

    name: str
    module: str
    function: str
    title: str

    def load(self) -> Callable[[RunInputs, EventLog], None]:
        """Import the stage's function."""
        function: Callable[[RunInputs, EventLog], None] = getattr(importlib.import_module(self.module), self.function)
        return function


STAGES = {
    stage.name: stage
    for stage in (
        Stage("validate", "dittocache.jobs.validation", "validate", "Checking settings, data set and model"),
        Stage("cache_latents", "dittocache.jobs.caching", "cache_latents", "Encoding pictures"),
        Stage("cache_text", "dittocache.jobs.caching", "cache_text", "Encoding prompts"),
        Stage("train", "dittocache.jobs.lora_training", "train", "Training the LoRA"),
        Stage("measure", "dittocache.jobs.measurement", "measure", "Comparing cached with live training"),
        Stage("generate", "dittocache.jobs.generation", "generate_edits", "Making pictures"),
        Stage("picture", "dittocache.jobs.one_picture", "make_one", "Making the picture"),
        Stage("calibrate", "dittocache.jobs.calibration", "calibrate", "Calibrating the step cache"),
        Stage("tune", "dittocache.jobs.tuning", "tune", "Tuning the step cache"),
        Stage("remove_cache", "dittocache.jobs.cache_removal", "remove_cache", "Removing the cache"),
        Stage("report", "dittocache.jobs.reporting", "report", "Writing the report"),
    )
}

CACHE = ("validate", "cache_latents", "cache_text")
TRAIN = (*CACHE, "train")
CACHING = ("cache_latents", "cache_text")
DEMO = (*TRAIN, "measure", "generate", "report")
