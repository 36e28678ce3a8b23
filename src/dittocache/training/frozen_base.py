"""The frozen transformer that a LoRA is trained on: in full, in 8 or 4 bit, on the device or offloaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from dittocache.errors import ConfigError, ModelError
from dittocache.families.base import Family
from dittocache.families.loading import diffusers_class
from dittocache.training.config import TrainConfig


def load_frozen(
    model: str,
    family: Family,
    config: TrainConfig,
    dtype: torch.dtype,
    device: str,
    notice: Callable[[str], None] = lambda text: None,
) -> Any:
    """The checkpoint's transformer as `train.base_quantization`, `offload` and `gradient_checkpointing` say.

    Call `add_lora` on it next. `notice` is told where a setting does nothing here.

    Raises ConfigError where a package that a setting needs is not installed, ModelError for the checkpoint.
    """
    offloaded = config.offload == "group" and torch.device(device).type != "cpu"
    if config.base_quantization in ("nf4", "int8"):
        transformer = _quantized(model, family, config, dtype, device)
    else:
        # Brought to its final size before it goes to the device, which may not hold it in full.
        first = "cpu" if offloaded or config.base_quantization == "fp8" else device
        transformer = family.load_pipeline(model, ["transformer"], dtype, first).transformer
    transformer.requires_grad_(False)
    if config.base_quantization == "fp8":
        store_in_fp8(transformer, dtype)
        if not config.gradient_checkpointing:
            notice(
                "train.base_quantization fp8 without train.gradient_checkpointing: the backward pass keeps every "
                "weight in the computing format, so that no memory is saved; set gradient_checkpointing to true"
            )
        if not offloaded:
            transformer.to(device)
    if config.offload == "group" and not offloaded:
        notice("train.offload group does nothing on the CPU: there is no other device to keep blocks away from")
    if offloaded:
        offload_layers(transformer, torch.device(device))
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def store_in_fp8(transformer: Any, dtype: torch.dtype) -> None:
    """Hold the weights as float8 (e4m3) and compute in `dtype`: diffusers' layerwise casting."""
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)


def offload_layers(transformer: Any, device: torch.device) -> None:
    """Keep the layers in the machine's memory and bring each to `device` for its own forward pass, one ahead.

    To be called before the LoRA is added: by layer, so that the LoRA's own layers, which come later, stay where they
    are, with their gradients and the optimizer's moments. Weights are recorded on the computing stream: those that the
    backward pass still reads must not be given away to the next layer's transfer.
    """
    streamed = device.type == "cuda"
    transformer.enable_group_offload(
        onload_device=device, offload_type="leaf_level", use_stream=streamed, record_stream=streamed, non_blocking=True
    )


def quantization_config(config: TrainConfig, dtype: torch.dtype, device: str) -> Any:
    """Diffusers' configuration for `nf4` (bitsandbytes) or `int8` (bitsandbytes, else torchao; torchao on the CPU).

    Raises ConfigError where no installed package can do it on `device`, or blocks are to be offloaded too.
    """
    import diffusers

    form = config.base_quantization
    if config.offload == "group":
        raise ConfigError(
            f"train.offload group does not go with train.base_quantization {form}; choose fp8 for offloaded blocks"
        )
    on_cpu = torch.device(device).type == "cpu"
    if form == "nf4" and on_cpu:
        raise ConfigError("train.base_quantization nf4 needs a GPU, this run is on the CPU; choose fp8 or int8")
    if importlib.util.find_spec("bitsandbytes") is not None and not on_cpu:
        if form == "nf4":
            return diffusers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    if form == "int8" and importlib.util.find_spec("torchao") is not None:
        return diffusers.TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    packages = "bitsandbytes" if form == "nf4" else "torchao" if on_cpu else "bitsandbytes or torchao"
    raise ConfigError(
        f"train.base_quantization {form} needs {packages}, which is not installed; "
        f"`pip install {packages.partition(' ')[0]}`, or choose fp8, which needs nothing more"
    )


def _quantized(model: str, family: Family, config: TrainConfig, dtype: torch.dtype, device: str) -> Any:
    options = {"quantization_config": quantization_config(config, dtype, device), "dtype": dtype}
    if torch.device(device).type != "cpu":
        options["device_map"] = {"": device}  # naming the CPU here would mean offloading, without quantization
    transformer_class = diffusers_class(family.transformer.class_name)
    try:
        return transformer_class.from_pretrained(model, subfolder="transformer", **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load the transformer of {model!r} as {config.base_quantization}: {error}") from error
