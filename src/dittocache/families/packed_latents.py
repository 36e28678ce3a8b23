"""What families with VAE latents packed 2 x 2 share: which pictures the VAE takes, and how they are encoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from dittocache.data.sample import Sample
from dittocache.errors import ModelError
from dittocache.families.base import Tensors
from dittocache.families.encoding import encode_distinct, is_wanted
from dittocache.families.loss_masks import LOSS_MASK, loss_mask
from dittocache.families.pictures import PictureRequest, Pictures

PACKED_PIXELS = 16  # pixels a side of one packed latent token: 8 by the VAE, 2 by packing

Requests = Mapping[str, Sequence[PictureRequest]]
"""What the VAE encodes of a sample, by artifact."""


def target_request(sample: Sample) -> PictureRequest:
    """The target as the VAE takes it."""
    return PictureRequest(sample.target, size=sample.size, flipped=sample.flipped, cropped=sample.cropped)


def vae_requests(sample: Sample, controls: Sequence[PictureRequest]) -> dict[str, Sequence[PictureRequest]]:
    """The target, and the controls where there are any."""
    return {"image_latents": [target_request(sample)], **({"control_latents": controls} if controls else {})}


def packed_shapes(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Frames, height and width in packed latents of pictures of (width, height) pixels."""
    return [(1, height // PACKED_PIXELS, width // PACKED_PIXELS) for width, height in sizes]


def facts_of(
    sample: Sample,
    shapes: Callable[[], Sequence[tuple[int, int, int]]],
    pictures: Pictures,
    wanted: Sequence[Collection[str]] | None,
    index: int,
) -> Tensors:
    """The artifacts that need no encoder, as far as they are wanted of the sample at `index`.

    Args:
        shapes: gives those of the target and of each control.
    """
    facts: Tensors = {}
    if is_wanted(wanted, index, "img_shapes"):
        facts["img_shapes"] = torch.tensor(shapes(), dtype=torch.int32)
    if sample.mask is not None and is_wanted(wanted, index, LOSS_MASK):
        facts[LOSS_MASK] = loss_mask(sample, PACKED_PIXELS, pictures)
    return facts


def encode_pictures(
    pipe: Any,
    requests: Iterable[Requests],
    wanted: Sequence[Collection[str]] | None,
    pictures: Pictures,
    packed: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    largest_batch: int,
) -> list[Tensors]:
    """For each sample the packed latents `(tokens, 64)` of each wanted artifact's pictures, one after the other.

    Pictures of one size pass the VAE together.

    Args:
        packed: gives the packed latents of each preprocessed picture of `(B, 3, H, W)`.

    Raises ModelError for a VAE that makes latents of another size.
    """
    if pipe.vae_scale_factor * 2 != PACKED_PIXELS:
        raise ModelError(
            f"the VAE makes one packed latent of {pipe.vae_scale_factor * 2} pixels a side; expected {PACKED_PIXELS}"
        )
    asked = [
        {name: parts for name, parts in by_artifact.items() if is_wanted(wanted, index, name)}
        for index, by_artifact in enumerate(requests)
    ]
    distinct = dict.fromkeys(one for by_artifact in asked for parts in by_artifact.values() for one in parts)
    preprocessed = {one: pipe.image_processor.preprocess(pictures(one)) for one in distinct}  # (1, 3, H, W) each
    latents = encode_distinct(
        distinct,
        lambda batch: packed(torch.cat([preprocessed[one] for one in batch])),
        largest_batch,
        alike=lambda one: preprocessed[one].shape,
    )
    return [
        {name: torch.cat([latents[one] for one in parts]) for name, parts in by_artifact.items()}
        for by_artifact in asked
    ]
