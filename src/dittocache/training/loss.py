"""The flow-matching loss: how far the predicted velocity is from noise - latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from dittocache.errors import DataError
from dittocache.families.base import Tensors, TrainingInputs

LOSS_MASK = "loss_mask"
"""Artifact of a sample: `(N,)` float weights of its latent tokens, 0 where nothing is to be learnt."""

Weighting = Literal["none", "sigma_sqrt", "cosmap"]


def predicted_velocity(model: Any, inputs: TrainingInputs, dtype: torch.dtype) -> torch.Tensor:
    """The transformer's velocity `(B, N, C)` for these inputs, run in `dtype`."""
    kwargs = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.transformer_kwargs.items()
    }
    predicted: torch.Tensor = inputs.select(model(**kwargs, return_dict=False)[0])
    return predicted


def velocity_losses(
    model: Any, inputs: TrainingInputs, dtype: torch.dtype, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared errors `(B,)` float32 between predicted and true velocity, the transformer run in `dtype`.

    Args:
        mask: weights `(B, N)` of the tokens; the loss of a sample is its weighted mean. None: all alike.
    """
    predicted = predicted_velocity(model, inputs, dtype)
    errors = (predicted.float() - inputs.target.float()).square().mean(dim=2)  # (B, N)
    return errors.mean(dim=1) if mask is None else (errors * mask).sum(dim=1) / mask.sum(dim=1)


def velocity_loss(model: Any, inputs: TrainingInputs, dtype: torch.dtype) -> torch.Tensor:
    """The mean of `velocity_losses`, a scalar."""
    return velocity_losses(model, inputs, dtype).mean()


def sigma_weights(weighting: Weighting, sigmas: torch.Tensor) -> torch.Tensor:
    """Weights `(B,)` of the losses at `sigmas` `(B,)`: Esser et al. 2024 (arXiv:2403.03206), as diffusers has them."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    weights: torch.Tensor = compute_loss_weighting_for_sd3(weighting, sigmas)
    return weights


def loss_mask(batch: Sequence[Tensors], names: Sequence[str], device: torch.device) -> torch.Tensor | None:
    """Token weights `(B, N)` float32 of samples of one bucket; None where no sample has a mask.

    A sample without a mask among others counts everywhere. Raises DataError naming a sample whose mask does not fit its
    latents, is negative or not finite, or leaves nothing to learn.
    """
    if not any(LOSS_MASK in sample for sample in batch):
        return None
    rows = []
    for name, sample in zip(names, batch, strict=True):
        tokens = sample["image_latents"].shape[0]
        row = sample.get(LOSS_MASK, torch.ones(tokens)).float()
        if row.shape != (tokens,):
            raise DataError(f"the loss mask of sample {name!r} has shape {tuple(row.shape)}; expected ({tokens},)")
        if not bool(torch.isfinite(row).all()) or float(row.min()) < 0 or float(row.max()) <= 0:
            raise DataError(
                f"the loss mask of sample {name!r} has values from {float(row.min())} to {float(row.max())}; expected "
                "none below 0 and some above: mend its mask picture, or remove it"
            )
        rows.append(row.to(device))
    return torch.stack(rows)
