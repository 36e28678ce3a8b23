"""What every stage shares: its folder, its JSONL log, atomic checkpoints and a schedule by the clock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


class Log:
    """Append one JSON object a line, stamped with the stage and the seconds since its start."""

    def __init__(self, path: Path, stage: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.stage, self.start = path, stage, time.monotonic()

    def write(self, **fields: Any) -> None:
        """Write one line and flush it."""
        line = {"stage": self.stage, "seconds": round(time.monotonic() - self.start, 1), **fields}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Budget:
    """Progress through a time budget that survives restarts: the learning rate follows it, not a step count."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.total, self.before, self.start = minutes * 60, spent, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds used so far, earlier runs included."""
        return self.before + time.monotonic() - self.start

    @property
    def fraction(self) -> float:
        """Share of the budget used, 0 to 1."""
        return min(1.0, self.spent / self.total)

    def rate(self, warmup: float = 0.02, hold: float = 0.4) -> float:
        """Learning-rate factor: linear warm-up, flat, then linear decay to zero at the end of the budget."""
        f = self.fraction
        return min(f / warmup, 1.0, (1.0 - f) / (1.0 - hold)) if f < 1.0 else 0.0


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside its place, then rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state, scratch)
    os.replace(scratch, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or None where there is none yet."""
    return torch.load(path, weights_only=True) if path.is_file() else None


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB images of one size to a float32 tensor (B, 3, H, W) in [-1, 1], as the pipeline's image processor does."""
    array = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield index batches for ever, every epoch a new permutation."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))
