"""The memory plan against what tensors really take."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.demo.tiny import save_tiny
from dittocache.errors import ModelError
from dittocache.families.base import Family
from dittocache.families.registry import get_family
from dittocache.training.config import TrainConfig
from dittocache.training.frozen_base import load_frozen
from dittocache.training.lora import add_lora
from dittocache.training.loss import velocity_loss
from dittocache.training.memory_plan import BatchSize, plan_memory, safetensors_sizes
from dittocache.training.optimizers import make_optimizer

SIZES = {
    "qwen-image-edit-plus": BatchSize(((1, 12, 10), (1, 8, 8)), text=40),
    "flux": BatchSize(((1, 12, 10),), text=40),
}


@pytest.fixture(scope="module", params=["qwen-image-edit-plus", "flux"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Family]:
    folder = tmp_path_factory.mktemp("model") / request.param
    return save_tiny(folder, request.param), get_family(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"base_quantization": "fp8", "gradient_checkpointing": True}, {"optimizer": "torch.optim.Adagrad"}]
)
def test_weights_lora_and_optimizer_are_exact(
    checkpoint: tuple[Path, Family], dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    folder, family = checkpoint
    config = TrainConfig.model_validate({"rank": 3, "ema_decay": 0.9, **settings})
    plan = plan_memory(folder, family, config, dtype, SIZES[family.name])

    transformer = load_frozen(str(folder), family, config, dtype, "cpu")
    parameters = add_lora(transformer, family, config)
    assert plan.weights == sum(one.nbytes for one in transformer.parameters() if not one.requires_grad)
    assert plan.lora == plan.gradients == plan.average == sum(one.nbytes for one in parameters)
    optimizer = make_optimizer(parameters, config)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for entries in optimizer.state.values() for value in entries.values()]
    assert plan.optimizer == sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    assert plan.notes == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_those_that_a_pass_keeps(checkpoint: tuple[Path, Family], dtype: torch.dtype) -> None:
    folder, family = checkpoint
    size, config = SIZES[family.name], TrainConfig(rank=3)
    planned = plan_memory(folder, family, config, dtype, size).activations

    transformer = load_frozen(str(folder), family, config, dtype, "cpu")
    add_lora(transformer, family, config)
    width = transformer.config.joint_attention_dim
    sample = {
        "image_latents": torch.zeros(size.noise, 64),
        "control_latents": torch.zeros(size.references, 64),
        "prompt_embeds": torch.zeros(size.text, width),
        "prompt_embeds_mask": torch.ones(size.text, dtype=torch.bool),
        "pooled_prompt_embeds": torch.zeros(32),
        "img_shapes": torch.tensor(size.img_shapes),
    }
    inputs = family.training_inputs([sample], torch.zeros(1, size.noise, 64), torch.ones(1))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = velocity_loss(transformer, inputs, dtype)
    for parameter in transformer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert planned == pytest.approx(sum(kept.values()), rel=0.1)
    del loss


def test_what_saves_memory_shows(checkpoint: tuple[Path, Family]) -> None:
    folder, family = checkpoint

    def plan(**settings: Any) -> Any:
        config = TrainConfig.model_validate({"rank": 3, **settings})
        return plan_memory(folder, family, config, torch.bfloat16, SIZES[family.name])

    plain = plan()
    assert plan(gradient_checkpointing=True).activations < plain.activations
    assert plan(base_quantization="fp8").weights < 0.65 * plain.weights
    assert plan(base_quantization="nf4").weights < plan(base_quantization="int8").weights < plain.weights
    assert plan(optimizer="adamw8bit").optimizer < 0.3 * plain.optimizer < plan(optimizer="prodigy").optimizer
    assert plan(batch_size=3).activations == pytest.approx(3 * plain.activations, rel=0.15)
    checkpointed, offloaded = (plan(gradient_checkpointing=True, offload=offload) for offload in ("none", "group"))
    blocks = offloaded.working - checkpointed.working  # two of two blocks, and no more than all
    assert 0.5 * offloaded.weights < blocks <= offloaded.weights
    assert offloaded.device_total == checkpointed.device_total - checkpointed.weights + blocks
    assert "weights" in plain.describe() and "MB" in plain.describe()
    assert plain.as_dict()["device_total"] == plain.device_total


def test_weights_that_are_not_there_are_told_and_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "flux")
    file = next((folder / "transformer").glob("*.safetensors"))
    other = save_tiny(tmp_path / "other", "qwen-image")
    shutil.copy(next((other / "transformer").glob("*.safetensors")), file)
    plan = plan_memory(folder, get_family("flux"), TrainConfig(), torch.float32, SIZES["flux"])
    assert "are not in the files of" in plan.describe()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ModelError, match="damaged"):
        safetensors_sizes(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    with pytest.raises(ModelError, match="no config"):
        plan_memory(folder, get_family("flux"), TrainConfig(), torch.float32, SIZES["flux"])
