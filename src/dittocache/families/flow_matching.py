"""Collate cached tensors of several samples into one batch, and mix in noise.

Rectified flow (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206): x_sigma = (1 - sigma) x_0 +
sigma noise, and the model learns the velocity d x_sigma / d sigma = noise - x_0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dittocache.errors import DataError
from dittocache.families.base import Tensors

Shape = tuple[int, int, int]


def interpolate(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_sigma, velocity), each `(B, N, C)`, of clean `latents` and `noise` `(B, N, C)` at `sigmas` `(B,)`."""
    sigma = sigmas.to(noise).view(-1, 1, 1)  # (B, 1, 1)
    return (1 - sigma) * latents + sigma * noise, noise - latents


def stack(batch: Sequence[Tensors], name: str, like: torch.Tensor) -> torch.Tensor:
    """Artifact `name` of every sample as one tensor, on the device and in the dtype of `like`.

    Raises DataError where a sample lacks it or shapes differ.
    """
    missing = [index for index, sample in enumerate(batch) if name not in sample]
    if missing:
        raise DataError(
            f"sample {missing[0]} of the batch has no {name}; it has {', '.join(sorted(batch[missing[0]]))}"
        )
    shapes = {tuple(sample[name].shape) for sample in batch}
    if len(shapes) != 1:
        raise DataError(
            f"{name} of one batch have different shapes: {', '.join(map(str, sorted(shapes)))}; "
            "a batch must hold samples of one bucket: group them by img_shapes, or train with batch_size 1"
        )
    return torch.stack([sample[name].to(like) for sample in batch])


def picture_shapes(batch: Sequence[Tensors]) -> list[list[Shape]]:
    """`img_shapes` of every sample, as the transformer takes them: (frames, height, width) in packed latents.

    Raises DataError where they differ: the transformer places all samples of a batch by the first one's shapes.
    """
    rows = [[(int(f), int(h), int(w)) for f, h, w in sample["img_shapes"].tolist()] for sample in batch]
    if any(row != rows[0] for row in rows):
        raise DataError(
            f"pictures of one batch have different sizes (in packed latents: {rows}); "
            "a batch must hold samples of one bucket: group them by img_shapes, or train with batch_size 1"
        )
    return rows


def pad_prompts(batch: Sequence[Tensors], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompt embeddings `(B, T, D)` padded with zeros to the longest, and their mask `(B, T)` bool.

    The mask is None where nothing is padded, as the pipeline passes it.
    """
    embeds = [sample["prompt_embeds"].to(like) for sample in batch]
    masks = [sample["prompt_embeds_mask"].to(like.device, torch.bool) for sample in batch]
    prompt_embeds = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
    if all(len(one) == prompt_embeds.shape[1] for one in embeds) and all(bool(mask.all()) for mask in masks):
        return prompt_embeds, None
    return prompt_embeds, torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
