"""Loss masks: a picture beside the target says how much each part of it counts, white most and black not at all."""

from __future__ import annotations

import numpy as np
import torch

from dittocache.data.sample import Sample
from dittocache.errors import DataError
from dittocache.families.base import Artifact, ArtifactInput
from dittocache.families.pictures import PictureRequest, Pictures, request_facts

LOSS_MASK = "loss_mask"


def mask_artifact(sample: Sample, packed_pixels: int) -> tuple[Artifact, ...]:
    """The artifact `loss_mask` `(N,)` float32 of a sample with a mask picture; none for a sample without."""
    if sample.mask is None:
        return ()
    transform = {"packed_pixels": packed_pixels, **request_facts(_request(sample))}
    return (Artifact(LOSS_MASK, None, (ArtifactInput("mask", file=sample.mask),), transform),)


def mask_pictures(sample: Sample) -> list[PictureRequest]:
    """The picture that `loss_mask` will ask for, if any."""
    return [] if sample.mask is None else [_request(sample)]


def loss_mask(sample: Sample, packed_pixels: int, pictures: Pictures) -> torch.Tensor:
    """How much each packed latent of the target counts: `(N,)` float32 in [0, 1], the mean brightness of its pixels.

    Args:
        packed_pixels: pixels a side of one packed latent.

    Raises DataError for a sample without a mask, and naming a picture that cannot be read.
    """
    grey = np.asarray(pictures(_request(sample)).convert("L"), np.float32) / 255  # (H, W)
    rows, columns = (side // packed_pixels for side in grey.shape)
    cells = grey.reshape(rows, packed_pixels, columns, packed_pixels)
    return torch.from_numpy(cells.mean(axis=(1, 3)).reshape(-1))


def _request(sample: Sample) -> PictureRequest:
    if sample.mask is None:
        raise DataError(f"sample {sample.name!r} has no loss mask")
    return PictureRequest(sample.mask, size=sample.size, flipped=sample.flipped, cropped=sample.cropped)
