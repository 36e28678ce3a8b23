"""Optimizers and number formats of packages that need not be installed: trained with, interrupted and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import MemoryReader

from dittocache.demo.tiny import save_tiny
from dittocache.families.base import Family
from dittocache.training.checkpoint import TENSORS_NAME, checkpoints
from dittocache.training.config import TrainConfig
from dittocache.training.frozen_base import load_frozen
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora
from dittocache.training.sources import CachedSource

SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 2, "rank": 4, "warmup_steps": 0, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen-image-edit-plus"))


@pytest.fixture
def losses(
    model: str, family: Family, reader: MemoryReader, tmp_path: Path
) -> Callable[..., tuple[list[float], list[float], Any]]:
    """Train, then again interrupted after two steps and resumed: both runs' losses, and the transformer."""

    def train(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[list[float], list[float], Any]:
        config = TrainConfig.model_validate({**SETTINGS, **settings})
        asked = iter([False, True])
        whole: list[float] = []
        parts: list[float] = []
        for folder, stop, found in (
            ("whole", lambda: False, whole),
            ("parts", lambda: next(asked), parts),
            ("parts", lambda: False, parts),
        ):
            transformer = load_frozen(model, family, config, dtype, "cpu")
            add_lora(transformer, family, config)
            options: dict[str, Any] = {"checkpoint_dir": tmp_path / folder, "resume": True, "should_stop": stop}
            run = train_lora(transformer, family, CachedSource(reader), reader.names, config, **options)
            found += [state.loss for state in run]
        assert checkpoints(tmp_path / "parts")[-1].name == "step-00000004"
        return whole, parts, transformer

    return train


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("prodigyopt", {"optimizer": "prodigy", "learning_rate": 1.0, "optimizer_args": {"d0": 1e-4}}),
        ("bitsandbytes", {"optimizer": "adamw8bit", "rank": 256}),  # small tensors stay in 32 bit
    ],
)
def test_optimizers_resume_exactly(package: str, settings: dict[str, Any], losses: Any, tmp_path: Path) -> None:
    pytest.importorskip(package)
    whole, parts, transformer = losses(settings)
    assert whole == parts
    moved = [one.detach().abs().max() for name, one in transformer.named_parameters() if "lora_B" in name]
    assert max(moved) > 1e-4
    state = load_file(checkpoints(tmp_path / "whole")[-1] / TENSORS_NAME)
    assert any(one.dtype == torch.uint8 for one in state.values()) == (package == "bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_lora_is_trained_on_int8_weights(dtype: torch.dtype, losses: Any) -> None:
    pytest.importorskip("torchao")
    whole, parts, transformer = losses({"base_quantization": "int8"}, dtype)
    assert whole == parts
    frozen = [one for one in transformer.parameters() if not one.requires_grad]
    assert sum(type(one).__name__ == "Int8Tensor" for one in frozen) > 20
