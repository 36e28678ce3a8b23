"""What a foreign cache must say, so that importing does not have to know the tool that wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from dittocache.data.sample import Sample
from dittocache.embeddings.foreign.expectation import Expected
from dittocache.embeddings.recipe import Recipe


@dataclass(frozen=True)
class Foreign:
    """One tensor of a foreign cache in the layout of this package.

    Attributes:
        tensor: on the CPU, without a batch axis and without padding.
        file: its file, relative to the cache's folder.
        notes: what was changed on the way.
    """

    tensor: torch.Tensor
    file: str
    notes: tuple[str, ...] = field(default=())


class ForeignCache(Protocol):
    """A folder that another tool cached into.

    Attributes:
        tool: the tool's name.
        folder: where its files are.
        verified: what its files allow to check, in words for people.
        unverified: what they do not, in words for people.
    """

    tool: str
    folder: Path
    verified: Sequence[str]
    unverified: Sequence[str]

    def read(self, sample: Sample, artifact: str, recipe: Recipe, expected: Expected) -> Foreign:
        """The tensor for this artifact of this sample.

        Raises RecordMissingError, saying why, where the folder has none; another CacheError where it has one that must
        not be used.
        """
        ...


def without_padding(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `(T, D)` and their mask `(T,)` up to the last valid token; raises ValueError where they do not fit."""
    if embeds.ndim != 2 or mask.shape != embeds.shape[:1]:
        raise ValueError(f"the mask has shape {list(mask.shape)}, the embeddings {list(embeds.shape)}")
    length = int(mask.sum())
    if not length or not bool(mask[:length].all()):
        raise ValueError(f"the mask is no row of {length} valid tokens followed by padding")
    return embeds[:length], mask[:length]


def as_mask(tensor: torch.Tensor) -> torch.Tensor:
    """A mask as booleans, whatever type the tool cast it to; raises ValueError unless it holds zeros and ones only."""
    mask = tensor.to(torch.bool)
    if tensor.ndim != 1 or not bool((mask.to(tensor.dtype) == tensor).all()):
        raise ValueError(f"the mask of shape {list(tensor.shape)} holds other values than 0 and 1")
    return mask
