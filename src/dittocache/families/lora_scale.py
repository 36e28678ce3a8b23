"""The LoRA scale that a pipeline passes among its attention arguments, for parts of a forward pass run by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def lora_scaled(module: nn.Module, attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
    """Apply `attention_kwargs["scale"]` to the LoRA layers of `module`, as diffusers' forward does; restored after."""
    scale = (attention_kwargs or {}).get("scale", 1.0)
    if scale == 1.0:
        yield
        return
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(module, scale)
    try:
        yield
    finally:
        unscale_lora_layers(module, scale)


def without_scale(attention_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is left of the attention arguments for the attention processors."""
    return {name: value for name, value in (attention_kwargs or {}).items() if name != "scale"}
