"""The loss: arithmetic that can be done by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.training.conftest import MemoryReader

from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import DataError
from dittocache.families.base import Family, TrainingInputs
from dittocache.training.config import TrainConfig
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora
from dittocache.training.loss import loss_mask, sigma_weights, velocity_loss, velocity_losses
from dittocache.training.sources import CachedSource

CPU = torch.device("cpu")


class Doubling(torch.nn.Module):
    """A denoiser that doubles its input."""

    def forward(self, hidden_states: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (2 * hidden_states,)


def _inputs(values: torch.Tensor, target: torch.Tensor) -> TrainingInputs:
    return TrainingInputs({"hidden_states": values}, target, lambda output: output[:, : target.shape[1]])


def test_the_loss_is_the_mean_squared_error_of_each_sample_in_float32() -> None:
    values = torch.tensor([[[1.0], [2.0], [9.0]], [[0.5], [0.0], [9.0]]])  # the third token is a reference
    target = torch.tensor([[[0.0], [1.0]], [[1.0], [1.0]]])
    losses = velocity_losses(Doubling(), _inputs(values, target), torch.bfloat16)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [(4 + 9) / 2, (0 + 1) / 2]
    assert float(velocity_loss(Doubling(), _inputs(values, target), torch.float32)) == 3.5


def test_masked_tokens_do_not_count() -> None:
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    target = torch.zeros(2, 2, 1)
    mask = torch.tensor([[1.0, 0.0], [0.5, 1.5]])
    losses = velocity_losses(Doubling(), _inputs(values, target), torch.float32, mask)
    assert losses.tolist() == [4.0, (0.5 * 36 + 0) / 2]


def test_a_sample_without_a_mask_counts_everywhere() -> None:
    latents = torch.zeros(3, 2)
    batch = [{"image_latents": latents, "loss_mask": torch.tensor([0.0, 1.0, 0.5])}, {"image_latents": latents}]
    mask = loss_mask(batch, ["a", "b"], CPU)
    assert mask is not None
    assert mask.tolist() == [[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]
    assert loss_mask(batch[1:], ["b"], CPU) is None


@pytest.mark.parametrize("row", [[1.0, 1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [math.nan, 1.0, 1.0]])
def test_a_mask_that_makes_no_sense_names_its_sample(row: list[float]) -> None:
    with pytest.raises(DataError, match="loss mask of sample 'one'"):
        loss_mask([{"image_latents": torch.zeros(3, 2), "loss_mask": torch.tensor(row)}], ["one"], CPU)


def test_weights_by_sigma_are_those_of_the_paper() -> None:
    sigmas = torch.tensor([0.5, 0.25])
    assert sigma_weights("none", sigmas).tolist() == [1.0, 1.0]
    assert sigma_weights("sigma_sqrt", sigmas).tolist() == [4.0, 16.0]
    assert sigma_weights("cosmap", sigmas).tolist() == pytest.approx([2 / (math.pi * 0.5), 2 / (math.pi * 0.625)])


def _losses(family: Family, reader: MemoryReader, **settings: Any) -> list[float]:
    config = TrainConfig.model_validate({"steps": 2, "rank": 2, "batch_size": 2, **settings})
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    add_lora(transformer, family, config)
    return [state.loss for state in train_lora(transformer, family, CachedSource(reader), reader.names, config)]


def test_training_uses_masks_and_weights(family: Family, reader: MemoryReader) -> None:
    plain = _losses(family, reader)
    assert _losses(family, reader, loss_weighting="sigma_sqrt")[0] > 1.5 * plain[0]
    for tensors in reader.tensors.values():
        tensors["loss_mask"] = torch.full((len(tensors["image_latents"]),), 0.3)
    assert _losses(family, reader) == pytest.approx(plain, rel=1e-5)  # a weighted mean: alike everywhere is no mask
    for tensors in reader.tensors.values():
        tensors["loss_mask"][1:] = 0
    assert _losses(family, reader)[0] != pytest.approx(plain[0], rel=1e-3)
