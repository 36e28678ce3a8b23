"""Which layers of FLUX get a LoRA, and that what is saved is the same LoRA in the stock pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dittocache.demo.tiny import tiny_pipeline
from dittocache.families.registry import get_family
from dittocache.training.config import TrainConfig
from dittocache.training.lora import WEIGHT_NAME, add_lora, save_lora

NAMES = ["flux", "flux-schnell", "flux-kontext"]


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_layer_of_the_blocks_but_the_modulation(name: str) -> None:
    transformer = tiny_pipeline(name).transformer
    linear = {one for one, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    add_lora(transformer, get_family(name), TrainConfig(rank=2))
    changed = {one.partition(".lora_A")[0] for one, weight in transformer.named_parameters() if weight.requires_grad}
    changed = {one for one in changed if ".lora_B" not in one}
    outside = {one for one in linear if not one.startswith(("transformer_blocks", "single_transformer_blocks"))}
    modulation = {one for one in linear if ".norm" in one}
    assert "proj_out" in outside
    assert changed == linear - outside - modulation


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_stock_pipeline_loads_it_with_and_without_metadata(name: str, with_metadata: bool, tmp_path: Path) -> None:
    # Other tools read no metadata: diffusers then takes the layers from the names of the weights.
    transformer = tiny_pipeline(name).transformer
    generator = torch.Generator().manual_seed(1)
    for parameter in add_lora(transformer, get_family(name), TrainConfig(rank=2)):
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    file = save_lora(transformer, get_family(name), tmp_path, {})
    if not with_metadata:
        save_file(load_file(file), tmp_path / WEIGHT_NAME)
    fresh = tiny_pipeline(name)
    kwargs = {
        "hidden_states": torch.randn(1, 12, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(12, 3),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    if name == "flux-schnell":
        kwargs["guidance"] = None
    base = fresh.transformer(**kwargs)[0]
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(fresh.transformer(**kwargs)[0], transformer(**kwargs)[0])
    assert not torch.equal(fresh.transformer(**kwargs)[0], base)
