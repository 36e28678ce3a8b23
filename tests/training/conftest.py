"""A tiny Edit-Plus pipeline, four samples on disk, and their artifacts as a cache would give them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dittocache.data.sample import Sample
from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import RecordMissingError
from dittocache.families.base import Family, Sizes, Tensors
from dittocache.families.registry import get_family
from dittocache.training.sources import LiveSource

SIZES = Sizes(resolution=64, condition_resolution=32)


class MemoryReader:
    """Stands for the embedding cache's reader: artifacts in a dict; a sample whose tensors are gone is missing."""

    def __init__(self, tensors: dict[str, Tensors]) -> None:
        self.names = list(tensors)
        self.tensors = tensors

    def load(self, name: str) -> Tensors:
        if name not in self.tensors:
            raise RecordMissingError(f"{name} is not cached")
        return self.tensors[name]

    def artifact(self, name: str, artifact: str) -> torch.Tensor:
        return self.load(name)[artifact]

    def prefetch(self, batches: Iterable[Sequence[str]], threads: int = 2) -> Iterator[list[Tensors]]:
        for names in batches:
            yield [self.load(name) for name in names]


@pytest.fixture
def family() -> Family:
    return get_family("qwen-image-edit-plus")


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline("qwen-image-edit-plus")


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two samples of each of two buckets."""

    def draw(name: str, seed: int) -> Path:
        path = tmp_path / name
        pixels = random.Random(seed).randbytes(3 * 6 * 5)
        Image.frombytes("RGB", (6, 5), pixels).resize((60, 60), Image.Resampling.BICUBIC).save(path)
        return path

    return [
        Sample(
            name=f"s{index}",
            target=draw(f"t{index}.png", index),
            controls=(draw(f"c{index}.png", index + 10),),
            prompt="make it red" + " and round" * index,
            size=(64, 64) if index < 2 else (64, 96),
        )
        for index in range(4)
    ]


@pytest.fixture
def names(samples: list[Sample]) -> list[str]:
    return [sample.name for sample in samples]


@pytest.fixture
def live(pipe: Any, family: Family, samples: list[Sample]) -> LiveSource:
    return LiveSource(pipe, family, samples, SIZES)


@pytest.fixture
def reader(live: LiveSource, names: list[str]) -> MemoryReader:
    """Everything cached."""
    return MemoryReader(dict(zip(names, live.load(names), strict=True)))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate remembers the first mixed precision of a process; forget it before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
