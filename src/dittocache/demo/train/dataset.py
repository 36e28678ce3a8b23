"""The encoded edits in memory, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dittocache.demo.train.encode import TEXT_LENGTH, chunk_path
from dittocache.demo.train.run import batches

EDITED_WEIGHT = 4.0  # loss weight of tokens whose clean latents differ between source and target
SHAPE_WEIGHT = 3.0  # of other tokens that are not plain ground: which of two shapes is meant is the hardest part
EDITED_THRESHOLD = 0.02  # mean squared difference of a token's 64 normalised values
SHAPE_THRESHOLD = 0.35  # the same, from the picture's median token


@dataclass
class Dataset:
    """Encoded edits: sources (S, 64, 64), targets (N, 64, 64), embeds (N, 22, 128) float16, with their indices."""

    sources: torch.Tensor
    targets: torch.Tensor
    source_index: torch.Tensor
    embeds: torch.Tensor
    lengths: torch.Tensor
    empty: torch.Tensor
    empty_lengths: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def load(cls, work_dir: Path) -> Dataset:
        """Load every chunk whose prompts and latents are both there. Raises FileNotFoundError where none is."""
        chunks, index = [], 0
        while chunk_path(work_dir, "latents", index).is_file() and chunk_path(work_dir, "prompts", index).is_file():
            chunks.append(_read(work_dir, index))
            index += 1
        if not chunks:
            raise FileNotFoundError(f"no encoded edits in {work_dir / 'data'}; run the stage `encode` first")
        offset, joined = 0, []
        for chunk in chunks:
            chunk["source_index"] = chunk["source_index"] + offset
            offset += len(chunk["sources"])
            joined.append(chunk)
        return cls(**{name: torch.cat([chunk[name] for chunk in joined]) for name in joined[0]})

    @classmethod
    def load_heldout(cls, work_dir: Path) -> Dataset:
        """Load the held-out evaluation edits."""
        return cls(**_read(work_dir, -1))

    def batches(self, size: int, seed: int) -> Iterator[torch.Tensor]:
        """Yield index batches for ever, every epoch a new permutation."""
        return batches(len(self), size, seed)

    def in_order(self, size: int, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
        """Whole batches of all edits, once, each with its own prompt."""
        for first in range(0, len(self) - size + 1, size):
            yield self.batch(torch.arange(first, first + size), 0.0, generator)

    def batch(self, index: torch.Tensor, empty_share: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One batch in float32: source, target (B, 64, 64), embeds (B, 22, 128), mask (B, 22), weights (B, 64)."""
        origin = self.source_index[index]
        source, target = self.sources[origin].float(), self.targets[index].float()
        use_empty = torch.rand(len(index), generator=generator) < empty_share
        embeds = torch.where(use_empty[:, None, None], self.empty[origin], self.embeds[index]).float()
        lengths = torch.where(use_empty, self.empty_lengths[origin], self.lengths[index])
        edited = (source - target).square().mean(dim=-1) > EDITED_THRESHOLD  # (B, 64)
        ground = source.median(dim=1, keepdim=True).values  # shapes cover less than half of the picture
        shape = (source - ground).square().mean(dim=-1) > SHAPE_THRESHOLD
        return {
            "source": source,
            "target": target,
            "embeds": embeds,
            "mask": torch.arange(TEXT_LENGTH) < lengths[:, None],
            "weights": torch.where(edited, EDITED_WEIGHT, torch.where(shape, SHAPE_WEIGHT, 1.0)),
        }


def _read(work_dir: Path, index: int) -> dict[str, torch.Tensor]:
    latents = torch.load(chunk_path(work_dir, "latents", index), weights_only=True)
    prompts = torch.load(chunk_path(work_dir, "prompts", index), weights_only=True)
    return {**latents, **prompts}
