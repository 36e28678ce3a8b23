"""Isolated references learnt from the model itself: who the teacher is, what is learnt, what is left as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dittocache.demo.tiny import tiny_pipeline
from dittocache.families.base import Family
from dittocache.families.denoiser import is_isolated
from dittocache.families.registry import get_family
from dittocache.training.base_model import as_base_model, base_velocity, mixed_target
from dittocache.training.config import TrainConfig
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora
from dittocache.training.loss import predicted_velocity, velocity_losses
from dittocache.training.sources import CachedSource

ISOLATED: dict[str, Any] = {"reference_visibility": "isolated"}
SETTINGS: dict[str, Any] = {**ISOLATED, "steps": 2, "batch_size": 2, "rank": 4, "learning_rate": 5e-3}


def _inputs(family: Family, reader: Any, names: list[str]) -> Any:
    batch = [reader.load(name) for name in names]
    noise = torch.randn(len(batch), *batch[0]["image_latents"].shape, generator=torch.Generator().manual_seed(0))
    return family.training_inputs(batch, noise, torch.tensor([0.3, 0.8]))


def _stock(family: Family, zero_cond_t: bool = True) -> Any:
    transformer = tiny_pipeline(family.name).transformer
    for part in (transformer, *transformer.transformer_blocks):
        part.zero_cond_t = zero_cond_t
    return transformer


def _pupil(family: Family, zero_cond_t: bool = True) -> Any:
    """A transformer with a LoRA that does something."""
    transformer = _stock(family, zero_cond_t)
    for number, parameter in enumerate(add_lora(transformer, family, TrainConfig.model_validate(SETTINGS))):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return transformer


def _losses(family: Family, reader: Any, names: list[str], **settings: Any) -> list[float]:
    config = TrainConfig.model_validate({**SETTINGS, "self_distillation": 1.0, **settings})
    transformer = tiny_pipeline(family.name).transformer
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    add_lora(transformer, family, config)
    return [state.loss for state in train_lora(transformer, family, CachedSource(reader), names, config)]


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_the_teacher_is_the_stock_model_and_the_pupil_comes_back(
    family: Family, reader: Any, names: list[str], zero_cond_t: bool
) -> None:
    inputs = _inputs(family, reader, names[:2])
    stock, pupil = _stock(family, zero_cond_t), _pupil(family, zero_cond_t)
    with torch.no_grad():
        before = predicted_velocity(pupil, inputs, torch.float32)
        expected = predicted_velocity(stock, inputs, torch.float32)
    found = base_velocity(pupil, inputs, torch.float32)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    with torch.no_grad():
        assert torch.equal(predicted_velocity(pupil, inputs, torch.float32), before)
    assert is_isolated(pupil)
    assert not torch.equal(before, expected)
    assert all(parameter.requires_grad for name, parameter in pupil.named_parameters() if "lora_" in name)


def test_kontext_has_a_teacher_too() -> None:
    family = get_family("flux-kontext")
    stock, pupil = tiny_pipeline(family.name).transformer, _pupil(family)
    before = [type(module.processor) for module in pupil.modules() if hasattr(module, "processor")]
    shape = {"text": (1, 6, stock.config.joint_attention_dim), "pooled": (1, stock.config.pooled_projection_dim)}
    draws = {name: torch.randn(size, generator=torch.Generator().manual_seed(1)) for name, size in shape.items()}
    kwargs = {
        "hidden_states": torch.randn(1, 8, stock.config.in_channels, generator=torch.Generator().manual_seed(2)),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([2.5]) if stock.config.guidance_embeds else None,
        "encoder_hidden_states": draws["text"],
        "pooled_projections": draws["pooled"],
        "txt_ids": torch.zeros(6, 3),
        "img_ids": torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).float(),
        "return_dict": False,
    }
    with torch.no_grad():
        expected = stock(**kwargs)[0]
        with as_base_model(pupil):
            assert torch.equal(pupil(**kwargs)[0], expected)
        assert pupil(**kwargs)[0].shape[1] == 4  # noise tokens alone: isolated again
    assert [type(module.processor) for module in pupil.modules() if hasattr(module, "processor")] == before


def test_an_error_in_the_teacher_leaves_the_pupil_as_it_was(family: Family) -> None:
    pupil = _pupil(family)
    with pytest.raises(RuntimeError, match="out of memory"), as_base_model(pupil):
        raise RuntimeError("out of memory")
    assert not any(getattr(block, "zero_cond_t", False) for block in pupil.transformer_blocks)
    assert not any(getattr(module, "disable_adapters", False) is True for module in pupil.modules())


def test_what_is_learnt_is_the_difference_to_the_teacher(family: Family, reader: Any, names: list[str]) -> None:
    inputs, pupil = _inputs(family, reader, names[:2]), _pupil(family)
    base = base_velocity(pupil, inputs, torch.float32)
    with torch.no_grad():
        velocity = predicted_velocity(pupil, inputs, torch.float32)
    losses = velocity_losses(pupil, replace(inputs, target=mixed_target(inputs, base, 1.0)), torch.float32)
    torch.testing.assert_close(losses, (velocity - base).square().mean(dim=(1, 2)))


def test_a_mixed_target_has_the_gradient_of_both_losses(family: Family, reader: Any, names: list[str]) -> None:
    inputs, pupil = _inputs(family, reader, names[:2]), _pupil(family)
    base = base_velocity(pupil, inputs, torch.float32)
    one = next(parameter for name, parameter in pupil.named_parameters() if "to_out.0.lora_B" in name)

    def gradient(share: float) -> torch.Tensor:
        target = mixed_target(inputs, base, share)
        loss = velocity_losses(pupil, replace(inputs, target=target), torch.float32).mean()
        return torch.autograd.grad(loss, one)[0]

    torch.testing.assert_close(gradient(0.3), 0.3 * gradient(1.0) + 0.7 * gradient(0.0))


def test_a_run_takes_the_teacher(family: Family, reader: Any, names: list[str]) -> None:
    taught = _losses(family, reader, names)
    assert taught != _losses(family, reader, names, self_distillation=0.0)
    assert taught == _losses(family, reader, names, gradient_checkpointing=True)
    assert taught[0] < _losses(family, reader, names, self_distillation=0.5)[0]  # before the first step: noise - data


def test_with_full_visibility_there_is_nothing_to_learn() -> None:
    with pytest.raises(ValidationError, match="self_distillation: 0.5 needs reference_visibility: isolated"):
        TrainConfig.model_validate({"self_distillation": 0.5})
