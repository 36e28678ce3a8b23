"""What the families' `encode` have in common: encode what is wanted, each distinct input once, alone or in batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item", bound=Hashable)
Encoded = TypeVar("Encoded")


def is_wanted(wanted: Sequence[Collection[str]] | None, index: int, name: str) -> bool:
    """Whether the artifact `name` of the sample at `index` is to be computed; None wants everything."""
    return wanted is None or name in wanted[index]


def encode_distinct(
    items: Iterable[Item],
    encode: Callable[[Sequence[Item]], Sequence[Encoded]],
    largest_batch: int = 1,
    alike: Callable[[Item], Hashable] = lambda item: None,
) -> dict[Item, Encoded]:
    """Every distinct item encoded once, in batches of at most `largest_batch` items that are `alike`."""
    groups: dict[Hashable, list[Item]] = {}
    for item in dict.fromkeys(items):
        groups.setdefault(alike(item), []).append(item)
    encoded: dict[Item, Encoded] = {}
    for group in groups.values():
        for start in range(0, len(group), largest_batch):
            batch = group[start : start + largest_batch]
            encoded.update(zip(batch, encode(batch), strict=True))
    return encoded


def without_padding(embeds: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The valid rows `(T, D)` of each prompt of a padded batch `(B, T, D)`; copies, which hold no padding alive."""
    return [row[valid.to(torch.bool)].clone() for row, valid in zip(embeds, mask, strict=True)]
