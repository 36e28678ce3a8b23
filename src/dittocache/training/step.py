"""The gradients of one optimizer step: this process's share of the batch, part by part."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from dittocache.families.base import Tensors
from dittocache.training.base_model import base_velocity, mixed_target
from dittocache.training.checkpoint import Trained
from dittocache.training.config import TrainConfig
from dittocache.training.loss import loss_mask, sigma_weights, velocity_losses
from dittocache.training.schedule import MicroBatch, draw, sample_seed
from dittocache.training.sources import with_empty_prompts

DROPOUT_PLACE = -1  # of the seed for what the model itself drops


@dataclass(frozen=True)
class StepGradients:
    """What a step's passes gave.

    Attributes:
        loss: mean over the whole batch, all processes together.
        at_fault: samples of this process whose loss is not finite.
        load_seconds: waiting for the source.
    """

    loss: float
    at_fault: tuple[str, ...]
    load_seconds: float

    def finite(self, grad_norm: float, scaled: bool) -> bool:
        """Whether the step may be taken; `scaled`: a scaler skips steps whose gradients overflow by itself."""
        return math.isfinite(self.loss) and (scaled or math.isfinite(grad_norm))


class StepRunner:
    """Runs the passes of each step.

    Args:
        model: the prepared (wrapped) transformer.
        stream: the tensors of all parts of all steps, in order.
        share: samples of this process in a step.
    """

    def __init__(
        self,
        model: Any,
        trained: Trained,
        config: TrainConfig,
        accelerator: Any,
        stream: Iterator[list[Tensors]],
        share: int,
        caption_dropout: float,
    ) -> None:
        self._model = model
        self._trained = trained
        self._config = config
        self._accelerator = accelerator
        self._stream = stream
        self._share = share
        self._caption_dropout = caption_dropout
        self._dtype = computing_dtype(trained.transformer)
        self._parameters = list(trained.parameters.values())

    def gradients(self, step: int, parts: Sequence[MicroBatch]) -> StepGradients:
        """Add up the gradients of the mean loss over the step's batch, synchronised in the last pass alone."""
        total = torch.zeros((), device=self._accelerator.device)
        at_fault: list[str] = []
        load_seconds = 0.0
        for number, part in enumerate(parts):
            began = time.perf_counter()
            batch = next(self._stream)
            load_seconds += time.perf_counter() - began
            last = number == len(parts) - 1
            # Without `no_sync` DDP would average the gradients in every pass, and count passes that differ.
            alone: AbstractContextManager[Any] = nullcontext() if last else self._accelerator.no_sync(self._model)
            with alone, self._seeded(step, part):
                losses = self._losses(step, part, batch)
                self._accelerator.backward(losses.sum() / self._share)
            total += losses.detach().sum() / self._share
            at_fault += [
                name for name, loss in zip(part.names, losses.tolist(), strict=True) if not math.isfinite(loss)
            ]
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.device != parameter.device:
                parameter.data = parameter.data.to(parameter.grad.device)  # its block was offloaded with it
        loss = float(self._accelerator.reduce(total, reduction="mean"))
        return StepGradients(loss, tuple(at_fault), load_seconds)

    def _losses(self, step: int, part: MicroBatch, batch: Sequence[Tensors]) -> torch.Tensor:
        """Weighted losses `(B,)`."""
        config, device = self._config, self._accelerator.device
        draws = [
            draw(config, step, place, tuple(sample["image_latents"].shape), self._caption_dropout)
            for place, sample in zip(part.places, batch, strict=True)
        ]
        if self._caption_dropout > 0:
            batch = with_empty_prompts(batch, [one.drop_caption for one in draws])
        noise = torch.stack([one.noise for one in draws]).to(device)  # (B, N, C)
        sigmas = torch.stack([one.sigma for one in draws]).to(device)  # (B,)
        inputs = self._trained.family.training_inputs(batch, noise, sigmas)
        if config.self_distillation > 0:
            base = base_velocity(self._trained.transformer, inputs, self._dtype)
            inputs = replace(inputs, target=mixed_target(inputs, base, config.self_distillation))
        losses = velocity_losses(self._model, inputs, self._dtype, loss_mask(batch, part.names, device))
        return losses * sigma_weights(config.loss_weighting, sigmas)

    @contextmanager
    def _seeded(self, step: int, part: MicroBatch) -> Iterator[None]:
        """What the model drops at random depends on the seed and the step; the caller's random numbers stay."""
        if self._config.lora_dropout == 0:
            yield
            return
        device = self._accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(sample_seed(self._config.seed, step, DROPOUT_PLACE - part.places[0]))
            yield


def computing_dtype(transformer: Any) -> torch.dtype:
    """The dtype that the frozen transformer computes in: of its weights that are not stored in 8 bit or less."""
    dtypes = {
        parameter.dtype
        for parameter in transformer.parameters()
        if not parameter.requires_grad and parameter.is_floating_point() and parameter.dtype.itemsize > 1
    }
    found: torch.dtype = min(dtypes, key=lambda dtype: dtype.itemsize)
    return found
