"""The training stage: a LoRA on cached embeddings, or on live ones where the cache is switched off or incomplete."""

from __future__ import annotations

import resource
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.events import EventLog, Progress
from dittocache.jobs.inputs import RunInputs, load_manifest
from dittocache.jobs.run_folder import CHECKPOINTS_NAME, LORA_NAME
from dittocache.training.checkpoint import checkpoints
from dittocache.training.interrupt import stop_on_signals
from dittocache.training.loop import TrainState, train_lora
from dittocache.training.lora import add_lora, save_lora
from dittocache.training.sources import CachedSource, LiveSource, MixedSource, Source

FINISHED_MARK = "finished"  # in the checkpoints' folder: that training is complete, the next one starts anew
PREVIOUS_NAME = "previous"  # where the outcome of the training before goes


def train(inputs: RunInputs, log: EventLog) -> None:
    """Train the LoRA of the run and save it to `RUN/lora`; an interrupted training goes on where it stopped.

    Emits a `metric` a step (loss, learning_rate, seconds of the step) and a `result`: steps, seconds, median seconds a
    step, peak memory in bytes, path of the LoRA. Raises KeyboardInterrupt after saving when it was stopped.
    """
    config = inputs.config.train
    make_room(inputs.run_dir)
    folder = inputs.run_dir / CHECKPOINTS_NAME
    done = len(checkpoints(folder)) and int(checkpoints(folder)[-1].name.rpartition("-")[2])
    log.emit("result", resumed_from=done, steps=config.steps)
    names, source = open_source(inputs, log)
    transformer = inputs.family.load_pipeline(inputs.model, ["transformer"], inputs.dtype, inputs.device).transformer
    add_lora(transformer, inputs.family, config)
    progress = Progress(log, config.steps - done)
    states: list[TrainState] = []
    with stop_on_signals() as should_stop:
        for state in train_lora(
            transformer,
            inputs.family,
            source,
            names,
            config,
            caption_dropout=inputs.config.data.caption_dropout,
            checkpoint_dir=folder,
            resume=True,
            should_stop=should_stop,
        ):
            states.append(state)
            _emit_step(log, state)
            progress.advance()
    if states and states[-1].stopped:
        log.message(f"stopped after step {states[-1].step}; everything up to it is saved in {folder}")
        raise KeyboardInterrupt
    save_lora(transformer, inputs.family, inputs.run_dir / LORA_NAME, config.model_dump(mode="json"))
    (folder / FINISHED_MARK).touch()
    log.emit(
        "result",
        steps=config.steps,
        seconds=states[-1].seconds if states else 0.0,
        seconds_per_step=statistics.median(state.step_seconds for state in states) if states else None,
        peak_bytes=peak_bytes(),
        lora=str(inputs.run_dir / LORA_NAME),
        cached=inputs.config.cache.use_cache,
    )


def open_source(inputs: RunInputs, log: EventLog) -> tuple[list[str], Source]:
    """The names to train on and where their tensors come from: the cache with live encoders behind it, or these."""

    def live() -> Source:
        return live_source(inputs)

    if not inputs.config.cache.use_cache:
        return [sample.name for sample in inputs.samples], live()
    manifest = load_manifest(inputs)
    cached = CachedSource(CachedSamples(inputs.store, manifest))
    return list(manifest.samples), MixedSource(cached, live, lambda text: log.message(text, level="warning"))


def live_source(inputs: RunInputs) -> LiveSource:
    """All encoders in memory, on the device of the transformer."""
    family = inputs.family
    components = {*family.encoders, *(name for beside in family.encoders.values() for name in beside)}
    pipe = family.load_pipeline(inputs.model, sorted(components), inputs.dtype, inputs.device)
    return LiveSource(pipe, family, inputs.samples, inputs.sizes, empty_prompts=inputs.config.data.caption_dropout > 0)


def make_room(run_dir: Path) -> None:
    """Put a finished training's LoRA and checkpoints aside, so that this one starts anew; leave an unfinished one."""
    folder = run_dir / CHECKPOINTS_NAME
    if not (folder / FINISHED_MARK).exists():
        return
    previous = run_dir / PREVIOUS_NAME
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    # The mark goes last: interrupted here, the next run finds it and makes room again.
    if (run_dir / LORA_NAME).exists():
        (run_dir / LORA_NAME).rename(previous / LORA_NAME)
    folder.rename(previous / CHECKPOINTS_NAME)


def peak_bytes() -> int:
    """Most memory that this process held: of the GPU where it used one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _emit_step(log: EventLog, state: TrainState) -> None:
    fields: dict[str, Any] = {
        "step": state.step,
        "loss": state.loss,
        "learning_rate": state.learning_rate,
        "seconds": state.step_seconds,
        "load_seconds": state.load_seconds,
        "grad_norm": state.grad_norm,
    }
    log.emit("metric", **fields)
