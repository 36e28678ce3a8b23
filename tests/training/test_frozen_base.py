"""The frozen transformer in other forms than its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dittocache.demo.tiny import save_tiny, tiny_pipeline
from dittocache.errors import ConfigError
from dittocache.families.base import Family
from dittocache.training.config import TrainConfig
from dittocache.training.frozen_base import load_frozen, offload_layers, quantization_config
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora
from dittocache.training.requirements import requirement_problems
from dittocache.training.sources import CachedSource

CONFIG = TrainConfig(steps=3, batch_size=2, rank=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen-image-edit-plus"))


def _losses(transformer: Any, family: Family, reader: Any, names: list[str], config: TrainConfig) -> list[float]:
    add_lora(transformer, family, config)
    return [state.loss for state in train_lora(transformer, family, CachedSource(reader), names, config)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fp8_trains_as_weights_rounded_to_it_and_stores_a_byte_each(
    family: Family, reader: Any, names: list[str], model: str, checkpointing: bool
) -> None:
    config = CONFIG.model_copy(update={"base_quantization": "fp8", "gradient_checkpointing": checkpointing})
    notices: list[str] = []
    stored = load_frozen(model, family, config, torch.float32, "cpu", notices.append)
    small = {name for name, one in stored.named_parameters() if one.dtype == torch.float8_e4m3fn}
    assert {name for name in small if "norm" in name} == set()
    assert len(small) > 40
    assert [("gradient_checkpointing" in text) for text in notices] == ([] if checkpointing else [True])

    rounded = tiny_pipeline("qwen-image-edit-plus").transformer
    for name, parameter in rounded.named_parameters():
        if name in small:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    expected = _losses(rounded, family, reader, names, CONFIG)
    assert _losses(stored, family, reader, names, config) == pytest.approx(expected, rel=1e-5)
    after = {name.replace(".base_layer", ""): one.dtype for name, one in stored.named_parameters()}
    assert {after[name] for name in small} == {torch.float8_e4m3fn}


def test_gradient_checkpointing_changes_nothing_but_memory(
    family: Family, reader: Any, names: list[str], model: str
) -> None:
    config = CONFIG.model_copy(update={"gradient_checkpointing": True})
    transformer = load_frozen(model, family, config, torch.float32, "cpu")
    assert transformer.is_gradient_checkpointing
    plain = load_frozen(model, family, CONFIG, torch.float32, "cpu")
    assert _losses(transformer, family, reader, names, config) == _losses(plain, family, reader, names, CONFIG)


def test_offloaded_layers_leave_the_lora_alone(family: Family, reader: Any, names: list[str], model: str) -> None:
    config = CONFIG.model_copy(update={"offload": "group", "gradient_checkpointing": True})
    transformer = load_frozen(model, family, CONFIG, torch.float32, "cpu")
    transformer.enable_gradient_checkpointing()
    offload_layers(transformer, torch.device("cpu"))
    add_lora(transformer, family, config)
    hooked = {name for name, one in transformer.named_modules() if hasattr(one, "_diffusers_hook")}
    assert any(name.endswith("base_layer") for name in hooked)
    assert not any("lora_" in name for name in hooked)
    moving = {
        id(parameter)
        for module in transformer.modules()
        if hasattr(module, "_diffusers_hook")
        for hook in module._diffusers_hook.hooks.values()
        for group in [getattr(hook, "group", None)]
        if group is not None
        for parameter in (*group.parameters, *(p for one in group.modules for p in one.parameters()))
    }
    frozen = {id(one) for one in transformer.parameters() if not one.requires_grad}
    assert moving == frozen

    states = list(train_lora(transformer, family, CachedSource(reader), names, config))
    plain = load_frozen(model, family, CONFIG, torch.float32, "cpu")
    assert [state.loss for state in states] == _losses(plain, family, reader, names, CONFIG)


def test_offloading_on_the_cpu_says_that_it_does_nothing(family: Family, model: str) -> None:
    config = CONFIG.model_copy(update={"offload": "group", "gradient_checkpointing": True})
    notices: list[str] = []
    load_frozen(model, family, config, torch.float32, "cpu", notices.append)
    assert len(notices) == 1 and "does nothing on the CPU" in notices[0]


def test_offloading_needs_gradient_checkpointing() -> None:
    with pytest.raises(ValidationError, match="needs gradient_checkpointing: true"):
        TrainConfig(offload="group")


@pytest.mark.parametrize(
    ("form", "device", "installed", "words"),
    [
        ("nf4", "cuda", set(), "pip install bitsandbytes"),
        ("int8", "cuda:1", set(), "bitsandbytes or torchao"),
        ("int8", "cpu", {"bitsandbytes"}, "pip install torchao"),  # diffusers refuses bitsandbytes without a GPU
        ("nf4", "cpu", {"bitsandbytes"}, "nf4 needs a GPU"),
    ],
)
def test_quantization_that_cannot_be_says_what_it_needs(
    form: Any, device: str, installed: set[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dittocache.training.frozen_base.importlib.util.find_spec", lambda name: name in installed or None
    )
    config = TrainConfig(base_quantization=form)
    with pytest.raises(ConfigError, match=words):
        quantization_config(config, torch.bfloat16, device)
    assert any(words in problem for problem in requirement_problems(config, device))


def test_offloaded_blocks_cannot_be_quantized_by_other_packages() -> None:
    config = TrainConfig(base_quantization="nf4", offload="group", gradient_checkpointing=True)
    [problem] = requirement_problems(config, "cuda")
    assert "choose fp8 for offloaded blocks" in problem
