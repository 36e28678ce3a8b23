"""The training stage: a LoRA on cached embeddings, or on live ones where the cache is switched off or incomplete.

With `train.processes`, or started by `accelerate launch -m dittocache.jobs.stage train --run-dir RUN`, it is one of
several processes, of which the first writes events, checkpoints and pictures.
"""

from __future__ import annotations

import os
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
from dittocache.jobs.training_identity import run_identity, sample_repeats
from dittocache.jobs.training_memory import memory_plan
from dittocache.jobs.training_pictures import TrainingPictures
from dittocache.jobs.training_processes import other_processes
from dittocache.training.accelerator import make_accelerator
from dittocache.training.checkpoint import RAW_NAME, checkpoint_step, checkpoints
from dittocache.training.frozen_base import load_frozen
from dittocache.training.interrupt import stop_on_signals
from dittocache.training.loop import TrainState, train_lora
from dittocache.training.lora import WEIGHT_NAME, add_lora
from dittocache.training.schedule import epoch_length, with_steps
from dittocache.training.sources import CachedSource, LiveSource, MixedSource, Source

FINISHED_MARK = "finished"  # in the checkpoints' folder: that training is complete, the next one starts anew
PREVIOUS_NAME = "previous"  # where the outcome of the training before goes
RAW_LORA_NAME = "lora-raw"  # with a moving average: the weights themselves, beside the average in LORA_NAME
LOGS_NAME = "logs"  # of tensorboard


def train(inputs: RunInputs, log: EventLog) -> None:
    """Train the LoRA of the run and save it to `RUN/lora`; an interrupted training goes on where it stopped.

    Emits the memory plan before anything is loaded, a `metric` a step (loss, learning_rate, seconds of the step), the
    pictures made on the way, and a `result`: steps, seconds, median seconds a step, peak memory in bytes, path of the
    LoRA. Raises KeyboardInterrupt after saving when it was stopped.
    """
    with other_processes(inputs.run_dir, inputs.config.train.processes):
        _train(inputs, log)


def _train(inputs: RunInputs, log: EventLog) -> None:
    config = inputs.config.train
    accelerator = make_accelerator(config, inputs.device, inputs.run_dir / LOGS_NAME)
    device = str(accelerator.device)
    if accelerator.is_main_process:
        make_room(inputs.run_dir)
    accelerator.wait_for_everyone()
    folder = inputs.run_dir / CHECKPOINTS_NAME
    saved = checkpoints(folder)
    done = checkpoint_step(saved[-1]) if saved else 0
    names, source = open_source(inputs, log, device)
    repeats = sample_repeats(inputs, names)
    config = with_steps(config, epoch_length(names, repeats), accelerator.num_processes)
    log.emit("result", resumed_from=done, steps=config.steps)
    plan = memory_plan(inputs, names, source)
    log.message(plan.describe())
    log.emit("result", memory_plan=plan.as_dict())

    def warn(text: str) -> None:
        log.message(text, level="warning")

    identity = run_identity(inputs, names, accelerator)
    transformer = load_frozen(inputs.model, inputs.family, config, inputs.dtype, device, warn)
    add_lora(transformer, inputs.family, config)
    pictures = TrainingPictures(inputs, transformer, accelerator.device) if config.validate_every else None
    if config.log_with:
        _start_loggers(inputs, accelerator)
    progress = Progress(log, config.steps - done)
    states: list[TrainState] = []
    with stop_on_signals() as should_stop:
        for state in train_lora(
            transformer,
            inputs.family,
            source,
            names,
            config,
            accelerator,
            caption_dropout=inputs.config.data.caption_dropout,
            checkpoint_dir=folder,
            resume=True,
            should_stop=should_stop,
            identity=identity,
            repeats=repeats,
            notice=warn,
        ):
            states.append(state)
            _emit_step(log, state)
            if config.log_with:
                accelerator.log(_numbers(state), step=state.step)
            progress.advance()
            if pictures is not None and config.validate_every and state.step % config.validate_every == 0:
                if accelerator.is_main_process:
                    with state.to_use():
                        made = pictures.make(state.step)
                    log.emit("result", validation={"step": state.step, "pictures": made})
                accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if states and states[-1].stopped:
        log.message(f"stopped after step {states[-1].step}; everything up to it is saved in {folder}")
        raise KeyboardInterrupt
    if accelerator.is_main_process:
        publish(checkpoints(folder)[-1], inputs.run_dir)
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


def publish(checkpoint: Path, run_dir: Path) -> None:
    """Put the LoRA of a checkpoint where it is looked for, and the raw weights beside it where it is an average."""
    for folder, name in ((checkpoint, LORA_NAME), (checkpoint / RAW_NAME, RAW_LORA_NAME)):
        if not (folder / WEIGHT_NAME).is_file():
            continue
        (run_dir / name).mkdir(exist_ok=True)
        temporary = run_dir / name / f".{WEIGHT_NAME}.{os.getpid()}"
        shutil.copyfile(folder / WEIGHT_NAME, temporary)
        temporary.replace(run_dir / name / WEIGHT_NAME)


def open_source(inputs: RunInputs, log: EventLog, device: str | None = None) -> tuple[list[str], Source]:
    """The names to train on and where their tensors come from: the cache with live encoders behind it, or these."""

    def live() -> Source:
        return live_source(inputs, device)

    if not inputs.config.cache.use_cache:
        return [sample.name for sample in inputs.samples], live()
    manifest = load_manifest(inputs)
    cached = CachedSource(CachedSamples(inputs.store, manifest))
    return list(manifest.samples), MixedSource(cached, live, lambda text: log.message(text, level="warning"))


def live_source(inputs: RunInputs, device: str | None = None) -> LiveSource:
    """All encoders in memory, on `device`, by default that of the transformer."""
    family = inputs.family
    components = {*family.encoders, *(name for beside in family.encoders.values() for name in beside)}
    pipe = family.load_pipeline(inputs.model, sorted(components), inputs.dtype, device or inputs.device)
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
    for name in (LORA_NAME, RAW_LORA_NAME):
        if (run_dir / name).exists():
            (run_dir / name).rename(previous / name)
    folder.rename(previous / CHECKPOINTS_NAME)


def peak_bytes() -> int:
    """Most memory that this process held: of the GPU where it used one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _emit_step(log: EventLog, state: TrainState) -> None:
    fields: dict[str, Any] = {**_numbers(state), "step": state.step, "seconds": state.step_seconds}
    log.emit("metric", **fields)


def _numbers(state: TrainState) -> dict[str, float]:
    return {
        "loss": state.loss,
        "learning_rate": state.learning_rate,
        "load_seconds": state.load_seconds,
        "grad_norm": state.grad_norm,
        "epoch": state.epoch,
    }


def _start_loggers(inputs: RunInputs, accelerator: Any) -> None:
    settings = inputs.config.train.model_dump(mode="json")
    flat = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    accelerator.init_trackers(
        inputs.config.name, config=flat, init_kwargs={"wandb": {"name": inputs.config.name, "dir": str(inputs.run_dir)}}
    )
