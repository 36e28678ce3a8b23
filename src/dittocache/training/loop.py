"""LoRA fine-tuning as a generator that yields its state after every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dittocache.errors import ConfigError, StageError
from dittocache.families.base import Family
from dittocache.training.accelerator import make_accelerator
from dittocache.training.checkpoint import (
    Trained,
    averaged,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    saved_settings,
)
from dittocache.training.config import TrainConfig
from dittocache.training.continuation import check_continuation, run_settings
from dittocache.training.optimizers import learning_rate_schedule, make_optimizer, restore_arguments
from dittocache.training.schedule import (
    NO_REPEATS,
    MicroBatch,
    epoch_length,
    global_batches,
    micro_batches,
    with_steps,
)
from dittocache.training.sources import Source
from dittocache.training.step import StepGradients, StepRunner


@dataclass(frozen=True)
class TrainState:
    """The run after one optimizer step.

    Attributes:
        step: optimizer steps taken, from 1.
        loss: weighted mean squared error of the velocity over this step's batch, all processes together.
        learning_rate: of this step.
        seconds: since `train_lora` began.
        step_seconds: of this step, `load_seconds` included.
        load_seconds: of it, waiting for the source: encoding when live, reading when cached.
        grad_norm: of all LoRA gradients before clipping.
        names: samples of this process's share of the batch.
        epoch: how often the data set was seen so far, on average.
        checkpoint: the folder written after this step, if any.
        stopped: True in the last state of a run that `should_stop` ended early.
        to_use: a context in which the transformer has the weights to use: the moving average where there is one.
    """

    step: int
    loss: float
    learning_rate: float
    seconds: float
    step_seconds: float
    load_seconds: float
    grad_norm: float
    names: tuple[str, ...]
    epoch: float = 0.0
    checkpoint: Path | None = None
    stopped: bool = False
    to_use: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, compare=False, repr=False)


def train_lora(
    transformer: Any,
    family: Family,
    source: Source,
    names: Sequence[str],
    config: TrainConfig,
    accelerator: Any = None,
    *,
    caption_dropout: float = 0.0,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    identity: Mapping[str, str] | None = None,
    repeats: Mapping[str, int] = NO_REPEATS,
    notice: Callable[[str], None] = lambda text: None,
) -> Iterator[TrainState]:
    """Train the LoRA that `add_lora` put into `transformer`, yielding a `TrainState` after every step.

    Args:
        names: the samples to train on; `source` gives their tensors.
        accelerator: an `accelerate.Accelerator`; by default `make_accelerator(config)`.
        caption_dropout: share of samples whose prompt is replaced by the empty one.
        checkpoint_dir: where checkpoints go, every `config.checkpoint_every` steps, at the end and when stopped;
            none are written where it is None.
        resume: go on from the newest checkpoint there, if any, exactly as if the run had not been interrupted.
        should_stop: asked after every step; when true, a checkpoint is written and the run ends.
        identity: digests of the `model` and of the `data`, compared when resuming.
        repeats: how often a sample comes in an epoch; once where it has no entry.
        notice: called with a sentence for the user where a resumed run is not quite a continuation.

    Raises:
        ConfigError: the transformer has no LoRA, or the checkpoint folder holds another run.
        StageError: the loss is not finite; the samples at fault are named, and the state before is saved.
        DataError: no samples, or a batch that the family cannot use.
    """
    accelerator = accelerator if accelerator is not None else make_accelerator(config)
    started = time.perf_counter()
    length = epoch_length(names, repeats)
    config = with_steps(config, length, accelerator.num_processes)
    trained = _trained(transformer, family, config, accelerator)
    rank, world = accelerator.process_index, accelerator.num_processes
    settings = run_settings(config, family, names, caption_dropout, world, identity or {}, repeats)
    done = _resumed(checkpoint_dir, resume, trained, settings, notice)
    restore_arguments(trained.optimizer, config)
    rate_at = learning_rate_schedule(config)
    placed = config.offload == "none" and config.base_quantization in ("none", "fp8")
    model, stepper = accelerator.prepare(transformer, trained.optimizer, device_placement=[placed, True])
    model.train()

    size = int(settings["global_batch"])
    buckets = {name: source.bucket(name) if size > 1 else () for name in names}
    batches = islice(global_batches(buckets, size, config.seed, repeats), done, config.steps)
    planned = [micro_batches(batch, buckets, config.batch_size, rank, world) for batch in batches]
    stream = source.stream([part.names for parts in planned for part in parts])
    runner = StepRunner(model, trained, config, accelerator, stream, size // world, caption_dropout)
    for step, parts in enumerate(planned, start=done):
        step_started = time.perf_counter()
        outcome = runner.gradients(step, parts)
        grad_norm = float(accelerator.clip_grad_norm_(list(trained.parameters.values()), config.max_grad_norm))
        if not outcome.finite(grad_norm, scaled=trained.scaler is not None):
            if checkpoint_dir is not None and step > done and accelerator.is_main_process:
                save_checkpoint(checkpoint_dir, step, trained, settings, config.keep_checkpoints)
            raise _not_finite(step, outcome, grad_norm, parts, config, accelerator)
        for group in trained.optimizer.param_groups:
            group["lr"] = rate_at(step)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        if trained.average is not None:
            trained.average.step(trained.parameters.values())

        now = time.perf_counter()
        state = TrainState(
            step=step + 1,
            loss=outcome.loss,
            learning_rate=rate_at(step),
            seconds=now - started,
            step_seconds=now - step_started,
            load_seconds=outcome.load_seconds,
            grad_norm=grad_norm,
            names=tuple(name for part in parts for name in part.names),
            epoch=(step + 1) * size / length,
            to_use=lambda: averaged(trained),
        )
        last = step + 1 == config.steps
        stopping = not last and _any_process(accelerator, should_stop())
        if checkpoint_dir is not None and (last or stopping or (step + 1) % config.checkpoint_every == 0):
            if accelerator.is_main_process:
                path = save_checkpoint(checkpoint_dir, step + 1, trained, settings, config.keep_checkpoints)
                state = replace(state, checkpoint=path)
            accelerator.wait_for_everyone()
        yield replace(state, stopped=stopping)
        if stopping:
            return


def _trained(transformer: Any, family: Family, config: TrainConfig, accelerator: Any) -> Trained:
    """The parts of a run that change; the transformer where it belongs."""
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(
            "the transformer has no trainable parameters; call add_lora(transformer, family, config) first"
        )
    if config.offload == "none" and config.base_quantization in ("none", "fp8"):
        transformer.to(accelerator.device)
    else:  # blocks are where their hooks put them
        for parameter in parameters:
            parameter.data = parameter.data.to(accelerator.device)
    average = None
    if config.ema_decay is not None:
        from diffusers.training_utils import EMAModel

        average = EMAModel(parameters, decay=config.ema_decay)
    return Trained(transformer, family, make_optimizer(parameters, config), average, accelerator.scaler)


def _resumed(
    folder: Path | None, resume: bool, trained: Trained, settings: Mapping[str, Any], notice: Callable[[str], None]
) -> int:
    """Steps that are done already; raises ConfigError where a new run would mix with an old one."""
    existing = checkpoints(folder) if folder is not None else []
    if not existing:
        return 0
    if not resume:
        raise ConfigError(
            f"{folder} already holds {len(existing)} checkpoints, the newest {existing[-1].name}; "
            "resume that run, or choose another folder"
        )
    differences = check_continuation(saved_settings(existing[-1]), settings, existing[-1])
    if differences:
        notice(
            f"going on from {existing[-1].name} with other settings, so the run will not be what it would have been "
            f"without the interruption: {'; '.join(differences)}"
        )
    return load_checkpoint(existing[-1], trained)


def _not_finite(
    step: int,
    outcome: StepGradients,
    grad_norm: float,
    parts: Sequence[MicroBatch],
    config: TrainConfig,
    accelerator: Any,
) -> StageError:
    """The error for a step that must not be taken, naming the samples of all processes."""
    from accelerate.utils import gather_object

    at_fault = gather_object([*outcome.at_fault])
    names = gather_object([name for part in parts for name in part.names])
    culprits = f"not finite for {', '.join(at_fault)}; " if at_fault else ""
    return StageError(
        f"step {step + 1}: the loss is {outcome.loss} and the gradient norm {grad_norm}, expected finite numbers; "
        f"{culprits}the batch was {', '.join(names)}. The step was not taken. Check these samples, lower "
        f"train.learning_rate ({config.learning_rate}), or train in bfloat16 or float32 rather than float16"
    )


def _any_process(accelerator: Any, flag: bool) -> bool:
    """Whether it holds on any process: they must stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    count = accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), reduction="sum")
    return bool(count.item())
