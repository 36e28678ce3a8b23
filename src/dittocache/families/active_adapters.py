"""Which LoRA a transformer runs with, told cheaply enough to ask at every call."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


def adapters_of(module: nn.Module) -> object:
    """What LoRA the transformer runs with: names, scales, merged or not, of one of its layers for them all.

    None without a LoRA. A change of it within a run makes what was kept worthless.
    """
    if not getattr(module, "peft_config", None):
        return None
    layer: Any = _first_tuner_layer(module)
    if layer is None:
        return None
    active = tuple(layer.active_adapters)
    scales = tuple(layer.scaling.get(name) for name in active)
    return active, scales, tuple(layer.merged_adapters), layer.disable_adapters


def working_adapters(module: nn.Module) -> tuple[str, ...]:
    """Names of the LoRAs that change what the transformer computes: merged into its weights, or active at a scale."""
    found: Any = adapters_of(module)
    if found is None:
        return ()
    active, scales, merged, disabled = found
    scaled = () if disabled else (name for name, scale in zip(active, scales, strict=True) if scale)
    return tuple(dict.fromkeys([*merged, *scaled]))


def _first_tuner_layer(module: nn.Module) -> nn.Module | None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    known = _tuner_layers.get(module)
    layer = None if known is None else known()
    if layer is None:
        layer = next((one for one in module.modules() if isinstance(one, BaseTunerLayer)), None)
        if layer is not None:
            _tuner_layers[module] = weakref.ref(layer)
    return layer


_tuner_layers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
