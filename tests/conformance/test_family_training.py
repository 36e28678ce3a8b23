"""Every family: batches for the transformer, and a LoRA that the stock pipeline loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.data.sample import Sample
from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import DataError
from dittocache.families.base import Family
from dittocache.training.config import TrainConfig
from dittocache.training.lora import add_lora, save_lora, target_pattern
from dittocache.training.loss import velocity_loss

CONFIG = TrainConfig(rank=4, alpha=2)


def _noise(batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    shape = (len(batch), *batch[0]["image_latents"].shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.capability("training")
def test_noise_and_target_follow_rectified_flow(
    family: Family, pipe: Any, samples: list[Sample], encode_all: Any
) -> None:
    batch = encode_all(family, pipe, samples)
    noise, sigmas = _noise(batch), torch.tensor([0.0, 0.25, 1.0])
    inputs = family.training_inputs(batch, noise, sigmas)
    clean = torch.stack([tensors["image_latents"] for tensors in batch])
    noisy = inputs.transformer_kwargs["hidden_states"][:, : noise.shape[1]]
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
    assert torch.equal(noisy[2], noise[2])
    assert torch.equal(inputs.target, noise - clean)
    assert torch.equal(inputs.transformer_kwargs["timestep"], sigmas)


@pytest.mark.capability("training")
def test_a_padded_batch_gives_each_sample_what_it_gets_alone(
    family: Family, pipe: Any, samples: list[Sample], encode_all: Any
) -> None:
    batch = encode_all(family, pipe, samples)
    noise, sigmas = _noise(batch), torch.tensor([0.2, 0.5, 0.9])
    together = family.training_inputs(batch, noise, sigmas)
    with torch.no_grad():
        predicted = together.select(pipe.transformer(**together.transformer_kwargs, return_dict=False)[0])
        assert predicted.shape == together.target.shape
        for index, tensors in enumerate(batch):
            alone = family.training_inputs([tensors], noise[index : index + 1], sigmas[index : index + 1])
            one = alone.select(pipe.transformer(**alone.transformer_kwargs, return_dict=False)[0])
            torch.testing.assert_close(predicted[index], one[0], rtol=1e-4, atol=1e-4)


@pytest.mark.capability("training")
def test_every_input_reaches_the_prediction(family: Family, pipe: Any, samples: list[Sample], encode_all: Any) -> None:
    first, second = encode_all(family, pipe, samples[:2])
    noise, sigmas = _noise([first]), torch.tensor([0.5])

    def prediction(tensors: dict[str, torch.Tensor], sigmas: torch.Tensor = sigmas) -> torch.Tensor:
        inputs = family.training_inputs([tensors], noise, sigmas)
        with torch.no_grad():
            return inputs.select(pipe.transformer(**inputs.transformer_kwargs, return_dict=False)[0])

    reference = prediction(first)
    for name in sorted({"prompt_embeds", "pooled_prompt_embeds", "control_latents", "image_latents"} & set(first)):
        swapped = {**first, name: second[name]}
        if name == "prompt_embeds" and "prompt_embeds_mask" in first:
            swapped["prompt_embeds_mask"] = second["prompt_embeds_mask"]
        difference = (prediction(swapped) - reference).norm() / reference.norm()
        assert difference > 1e-3, name
    assert (prediction(first, torch.tensor([0.8])) - reference).norm() / reference.norm() > 1e-2


@pytest.mark.capability("training")
def test_different_sizes_in_one_batch_are_an_error(
    family: Family, pipe: Any, samples: list[Sample], encode_all: Any
) -> None:
    batch = encode_all(family, pipe, samples[:2])
    batch[1]["img_shapes"] = batch[1]["img_shapes"].flip(1)
    with pytest.raises(DataError, match="one bucket"):
        family.training_inputs(batch, _noise(batch), torch.tensor([0.5, 0.5]))


@pytest.mark.capability("lora")
def test_lora_targets_name_modules(family: Family, pipe: Any) -> None:
    names = [name for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in family.lora_targets:
        assert any(re.fullmatch(target_pattern([target]), name) for name in names), target


@pytest.mark.capability("lora")
def test_one_step_moves_lora_parameters_only_and_the_stock_pipeline_loads_them(
    family: Family, pipe: Any, case: Any, samples: list[Sample], tmp_path: Path, encode_all: Any
) -> None:
    batch = encode_all(family, pipe, samples[:1])
    inputs = family.training_inputs(batch, _noise(batch), torch.tensor([0.5]))
    transformer = pipe.transformer

    def output(module: Any) -> torch.Tensor:
        with torch.no_grad():
            return module(**inputs.transformer_kwargs, return_dict=False)[0]

    base = output(transformer)
    parameters = add_lora(transformer, family, CONFIG)
    assert torch.equal(output(transformer), base), "a fresh LoRA must not change the output"
    before = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    velocity_loss(transformer, inputs, torch.float32).backward()
    optimizer.step()
    moved = {name for name, parameter in transformer.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)

    trained = output(transformer)
    assert (trained - base).norm() / base.norm() > 1e-3
    save_lora(transformer, family, tmp_path / "lora", {"steps": 1})
    fresh = tiny_pipeline(case.tiny, **case.options)
    fresh.load_lora_weights(tmp_path / "lora")
    assert torch.equal(output(fresh.transformer), trained)
    fresh.unload_lora_weights()
    assert torch.equal(output(fresh.transformer), base)
