"""The measuring stage: the same training steps on cached and on live embeddings, one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from dittocache.errors import ConfigError
from dittocache.events import EventLog, Progress
from dittocache.jobs.inputs import RunInputs, load_manifest
from dittocache.jobs.lora_training import live_source, open_source, peak_bytes
from dittocache.training.accelerator import make_accelerator
from dittocache.training.frozen_base import load_frozen
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora
from dittocache.training.sources import Source

WARM_UP_STEPS = 2  # the first steps allocate and compile; they are left out
MEASURED_STEPS = 6


def measure(inputs: RunInputs, log: EventLog) -> None:
    """Time training steps cached, then live, on throw-away LoRA weights: same samples, batches, noise and model.

    Cached goes first, so that its peak memory is taken before any encoder is loaded. Emits a `result` with, for
    each, median seconds a step, steps and peak memory in bytes. Raises ConfigError where the cache is switched off.
    """
    if not inputs.config.cache.use_cache:
        raise ConfigError("cache.use_cache is false: there is no cached training to compare with; set it to true")
    names = list(load_manifest(inputs).samples)
    settings = inputs.config.train.model_copy(update={"log_with": []})
    accelerator = make_accelerator(settings, inputs.device)
    transformer = load_frozen(inputs.model, inputs.family, settings, inputs.dtype, inputs.device)
    add_lora(transformer, inputs.family, settings)
    progress = Progress(log, 2 * (WARM_UP_STEPS + MEASURED_STEPS))
    cached = _timed(inputs, transformer, accelerator, open_source(inputs, log)[1], names, progress)
    live = _timed(inputs, transformer, accelerator, live_source(inputs), names, progress)
    ratio = live["seconds_per_step"] / cached["seconds_per_step"]
    words = f"cached {cached['seconds_per_step']:.3f} s a step, live {live['seconds_per_step']:.3f} s: {ratio:.1f}x"
    log.emit("result", cached=cached, live=live, words=words)


def _timed(
    inputs: RunInputs, transformer: Any, accelerator: Any, source: Source, names: Sequence[str], progress: Progress
) -> dict[str, float | int]:
    settings = inputs.config.train.model_copy(update={"epochs": None, "steps": WARM_UP_STEPS + MEASURED_STEPS})
    seconds = []
    dropout = inputs.config.data.caption_dropout
    for state in train_lora(transformer, inputs.family, source, names, settings, accelerator, caption_dropout=dropout):
        seconds.append(state.step_seconds)
        progress.advance()
    return {
        "seconds_per_step": statistics.median(seconds[WARM_UP_STEPS:]),
        "steps": MEASURED_STEPS,
        "peak_bytes": peak_bytes(),
    }
