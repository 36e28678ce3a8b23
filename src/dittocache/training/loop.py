"""LoRA fine-tuning as a generator that yields its state after every step."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dittocache.errors import ConfigError, StageError
from dittocache.families.base import Family, TrainingInputs
from dittocache.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from dittocache.training.config import TrainConfig
from dittocache.training.schedule import batches_from, draw_sigmas, learning_rate_at, step_generator
from dittocache.training.sources import Source, with_empty_prompts

# What may change between a run and its continuation: how long it is, and how often it saves.
FREE_SETTINGS = frozenset({"steps", "checkpoint_every"})


@dataclass(frozen=True)
class TrainState:
    """The run after one optimizer step.

    Attributes:
        step: optimizer steps taken, from 1.
        loss: mean squared error of the velocity over this step's batch, all processes together.
        learning_rate: of this step.
        seconds: since `train_lora` began.
        step_seconds: of this step, `load_seconds` included.
        load_seconds: of it, waiting for the source: encoding when live, reading when cached.
        grad_norm: of all LoRA gradients before clipping.
        names: samples of this process's batch.
        checkpoint: the folder written after this step, if any.
        stopped: True in the last state of a run that `should_stop` ended early.
    """

    step: int
    loss: float
    learning_rate: float
    seconds: float
    step_seconds: float
    load_seconds: float
    grad_norm: float
    names: tuple[str, ...]
    checkpoint: Path | None = None
    stopped: bool = False


def make_accelerator(**options: Any) -> Any:
    """An `accelerate.Accelerator` fit for LoRA on these models, single process or DDP."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # The last block's text stream does not reach the output, so its LoRA has no gradient; DDP must know.
    return Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)], **options)


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
) -> Iterator[TrainState]:
    """Train the LoRA that `add_lora` put into `transformer`, yielding a `TrainState` after every step.

    Args:
        names: the samples to train on; `source` gives their tensors.
        accelerator: an `accelerate.Accelerator`; by default `make_accelerator()`.
        caption_dropout: share of samples whose prompt is replaced by the empty one.
        checkpoint_dir: where checkpoints go, every `config.checkpoint_every` steps, at the end and when stopped;
            none are written where it is None.
        resume: go on from the newest checkpoint there, if any, exactly as if the run had not been interrupted.
        should_stop: asked after every step; when true, a checkpoint is written and the run ends.

    Raises:
        ConfigError: the transformer has no LoRA, or the checkpoint folder holds another run.
        StageError: the loss is not finite; the samples of the batch are named.
        DataError: no samples, or a batch that the family cannot use.
    """
    accelerator = accelerator if accelerator is not None else make_accelerator()
    started = time.perf_counter()
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(
            "the transformer has no trainable parameters; call add_lora(transformer, family, config) first"
        )
    dtype = next(p.dtype for p in transformer.parameters() if not p.requires_grad and p.is_floating_point())
    bare = transformer
    transformer.to(accelerator.device)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
    settings = _settings(config, family, names, caption_dropout, accelerator.num_processes)
    done = _resumed(checkpoint_dir, resume, bare, family, optimizer, settings)
    model, stepper = accelerator.prepare(transformer, optimizer)
    model.train()

    buckets = {name: source.bucket(name) if config.batch_size > 1 else () for name in names}
    rank, world = accelerator.process_index, accelerator.num_processes
    planned = list(batches_from(buckets, config.batch_size, config.seed, done, config.steps - done, rank, world))
    stream = source.stream(planned)
    for step, batch_names in enumerate(planned, start=done):
        step_started = time.perf_counter()
        batch = next(stream)
        load_seconds = time.perf_counter() - step_started

        generator = step_generator(config.seed, step, rank)
        if caption_dropout > 0:
            batch = with_empty_prompts(batch, (torch.rand(len(batch), generator=generator) < caption_dropout).tolist())
        noise = torch.randn((len(batch), *batch[0]["image_latents"].shape), generator=generator)
        sigmas = draw_sigmas(config, len(batch), generator)
        inputs = family.training_inputs(batch, noise.to(accelerator.device), sigmas.to(accelerator.device))
        loss = velocity_loss(model, inputs, dtype)

        rate = learning_rate_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        accelerator.backward(loss)
        grad_norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
        mean_loss = float(accelerator.reduce(loss.detach(), reduction="mean"))
        scaled = accelerator.scaler is not None  # fp16: an overflowing gradient is skipped and the scale lowered
        if not math.isfinite(mean_loss) or not (scaled or math.isfinite(grad_norm)):
            raise StageError(
                f"step {step + 1}: the loss is {mean_loss} and the gradient norm {grad_norm}, expected finite numbers; "
                f"the batch was {', '.join(batch_names)}. Check these samples, lower train.learning_rate "
                f"({config.learning_rate}), or train in bfloat16 or float32 rather than float16"
            )
        stepper.step()
        stepper.zero_grad(set_to_none=True)

        now = time.perf_counter()
        state = TrainState(
            step=step + 1,
            loss=mean_loss,
            learning_rate=rate,
            seconds=now - started,
            step_seconds=now - step_started,
            load_seconds=load_seconds,
            grad_norm=grad_norm,
            names=tuple(batch_names),
        )
        last = step + 1 == config.steps
        stopping = not last and _any_process(accelerator, should_stop())
        if checkpoint_dir is not None and (last or stopping or (step + 1) % config.checkpoint_every == 0):
            if accelerator.is_main_process:
                path = save_checkpoint(checkpoint_dir, step + 1, bare, family, optimizer, settings)
                state = replace(state, checkpoint=path)
            accelerator.wait_for_everyone()
        yield replace(state, stopped=stopping)
        if stopping:
            return


def velocity_loss(model: Any, inputs: TrainingInputs, dtype: torch.dtype) -> torch.Tensor:
    """Mean squared error in float32 between predicted and true velocity, the transformer run in `dtype`."""
    kwargs = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.transformer_kwargs.items()
    }
    predicted = inputs.select(model(**kwargs, return_dict=False)[0])
    return torch.nn.functional.mse_loss(predicted.float(), inputs.target.float())


def _settings(
    config: TrainConfig, family: Family, names: Sequence[str], caption_dropout: float, world: int
) -> dict[str, Any]:
    """What the run's numbers depend on, as JSON values: a continuation must have the same."""
    digest = hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=16).hexdigest()
    return {
        **config.model_dump(mode="json", exclude=set(FREE_SETTINGS)),
        "family": family.name,
        "caption_dropout": caption_dropout,
        "processes": world,
        "samples": f"{len(names)} ({digest})",
    }


def _resumed(
    folder: Path | None, resume: bool, transformer: Any, family: Family, optimizer: Any, settings: dict[str, Any]
) -> int:
    """Steps already taken: those of the newest checkpoint when resuming, else 0."""
    found = checkpoints(folder) if folder is not None else []
    if not found:
        return 0
    if not resume:
        raise ConfigError(
            f"{folder} already holds {len(found)} checkpoints of a run; resume it, or choose or clear a folder"
        )
    return load_checkpoint(found[-1], transformer, family, optimizer, settings)


def _any_process(accelerator: Any, flag: bool) -> bool:
    """True on all processes where it is true on any: they must leave the loop together."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), reduction="sum") > 0)
