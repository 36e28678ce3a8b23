"""What a LoRA file says about the references it was trained with, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import ModelError
from dittocache.families.base import Family
from dittocache.families.denoiser import is_isolated
from dittocache.referencekv.rules import lora_visibility
from dittocache.training.config import TrainConfig
from dittocache.training.continuation import check_continuation
from dittocache.training.lora import WEIGHT_NAME, add_lora, read_reference_visibility, restore_lora, save_lora


def _transformer(family: Family, visibility: str) -> Any:
    transformer = tiny_pipeline(family.name).transformer
    add_lora(transformer, family, TrainConfig.model_validate({"rank": 2, "reference_visibility": visibility}))
    return transformer


@pytest.mark.parametrize("visibility", ["full", "isolated"])
def test_saved_and_read_back(family: Family, tmp_path: Path, visibility: str) -> None:
    transformer = _transformer(family, visibility)
    assert is_isolated(transformer) is (visibility == "isolated")
    save_lora(transformer, family, tmp_path, {})
    assert read_reference_visibility(tmp_path) == visibility
    pipe = tiny_pipeline(family.name)
    pipe.load_lora_weights(tmp_path)
    assert lora_visibility(pipe.transformer) == (visibility if visibility == "isolated" else None)
    restore_lora(_transformer(family, visibility), family, tmp_path)
    other = {"full": "isolated", "isolated": "full"}[visibility]
    with pytest.raises(ModelError, match=f"trained with train.reference_visibility {visibility}, .* are {other}"):
        restore_lora(_transformer(family, other), family, tmp_path)


def test_a_lora_of_others_was_trained_with_full_visibility(family: Family, tmp_path: Path) -> None:
    save_lora(_transformer(family, "isolated"), family, tmp_path, {})
    save_file(load_file(tmp_path / WEIGHT_NAME), tmp_path / WEIGHT_NAME)
    assert read_reference_visibility(tmp_path) == "full"


def test_an_unknown_word_is_an_error(family: Family, tmp_path: Path) -> None:
    metadata = {"reference_visibility": "causal"}
    save_lora(_transformer(family, "full"), family, tmp_path, {})
    save_file(load_file(tmp_path / WEIGHT_NAME), tmp_path / WEIGHT_NAME, metadata=metadata)
    with pytest.raises(ModelError, match="names the reference_visibility 'causal', expected 'full' or 'isolated'"):
        read_reference_visibility(tmp_path)


def test_checkpoints_of_before_there_was_a_choice_go_on_with_full_visibility() -> None:
    current = {"reference_visibility": "full", "self_distillation": 0.0}
    assert check_continuation({}, current, Path("step-1")) == []
