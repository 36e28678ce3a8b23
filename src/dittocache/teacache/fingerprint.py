"""Which model a profile was made for: the transformer, its weights, its LoRA and its sampler, told from memory.

No file is read: a pipeline may come from anywhere, and a LoRA may be loaded, scaled or fused since. Of each weight up
to 64 values spread over it are taken, rounded to bfloat16, so that a checkpoint has one digest in whatever format it
is loaded, and another one after any fine-tuning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from blake3 import blake3
from torch import nn

from dittocache.families.active_adapters import adapters_of
from dittocache.families.denoiser import Denoiser
from dittocache.settings import Settings

_VALUES = 64  # of each weight
_DIGEST_BYTES = 16
_PROVENANCE = frozenset({"dtype", "torch_dtype"})  # besides everything that begins with "_"


class LoraPrint(Settings):
    """A LoRA that is active."""

    weights: str | None
    """Digest of its weights; None where they cannot be read."""
    scale: float | None
    """What it is multiplied with."""


class ModelPrint(Settings):
    """What a model computes with, short of prompt, pictures and run."""

    transformer: str
    """Class of the transformer."""
    config: str
    """Digest of its configuration."""
    weights: str | None
    """Digest of its weights without LoRA; None where they are not in memory (sequential offloading)."""
    lora: tuple[LoraPrint, ...]
    """Active LoRAs; a fused one is part of the weights."""
    sampler: dict[str, Any] | None
    """Class and settings of the scheduler; None for a bare transformer."""

    def differences(self, other: ModelPrint) -> list[str]:
        """What `other` has that is different, in words; what neither side knows is no difference."""
        found = []
        if (self.transformer, self.config) != (other.transformer, other.config):
            found.append(f"the architecture ({self.transformer}, now {other.transformer}, or its configuration)")
        if self.weights is not None and other.weights is not None and self.weights != other.weights:
            found.append("the checkpoint (other weights)")
        if self.lora != other.lora:
            found.append(f"the LoRA ({_lora_words(self.lora)}, now {_lora_words(other.lora)})")
        if self.sampler is not None and other.sampler is not None and self.sampler != other.sampler:
            found.append(f"the sampler ({_sampler_words(self.sampler, other.sampler)})")
        return found


def fingerprint(denoiser: Denoiser) -> ModelPrint:
    """The model as it is now; reads a few values of every weight from the device."""
    module = denoiser.module
    adapters, base = _divided(module)
    return ModelPrint(
        transformer=type(module).__name__,
        config=json_digest(_plain(getattr(module, "config", {}))),
        weights=_values_digest(base),
        lora=tuple(
            LoraPrint(weights=_values_digest(adapters.get(name, ())), scale=scale) for name, scale in _scales(module)
        ),
        sampler=_sampler(denoiser.scheduler),
    )


def json_digest(content: Any) -> str:
    """Digest of JSON values, whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return str(blake3(text.encode()).hexdigest(length=_DIGEST_BYTES))


def _divided(module: nn.Module) -> tuple[dict[str, list[tuple[str, torch.Tensor]]], list[tuple[str, torch.Tensor]]]:
    """(weights of each adapter by its name, weights of the model under the names that they have without adapters)."""
    own = dict(module.named_parameters())
    adapters: dict[str, list[tuple[str, torch.Tensor]]] = {}
    if not getattr(module, "peft_config", None):
        return adapters, list(own.items())
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer_name, layer in module.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for name, weight in layer.named_parameters():
            parts = name.split(".")
            if parts[0] == "base_layer":
                continue
            own.pop(f"{layer_name}.{name}", None)
            for adapter in set(parts) & set(layer.active_adapters):
                place = ".".join("*" if part == adapter else part for part in parts)
                adapters.setdefault(adapter, []).append((f"{layer_name}.{place}", weight))
    return adapters, [(name.replace(".base_layer.", "."), weight) for name, weight in own.items()]


def _scales(module: nn.Module) -> list[tuple[str, float | None]]:
    """(name, scale) of the LoRAs that take part in the computation and are not merged into the weights."""
    found: Any = adapters_of(module)
    if found is None:
        return []
    active, scales, merged, disabled = found
    return [] if disabled else [(name, scale) for name, scale in zip(active, scales, strict=True) if name not in merged]


def _values_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    digest = blake3()
    for name, weight in sorted(weights, key=lambda one: one[0]):
        if weight.is_meta:
            return None
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _VALUES)][:_VALUES]
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(some.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return str(digest.hexdigest(length=_DIGEST_BYTES))


def _sampler(scheduler: Any) -> dict[str, Any] | None:
    if scheduler is None:
        return None
    return {"class": type(scheduler).__name__, **_plain(getattr(scheduler, "config", {}))}


def _plain(config: Any) -> dict[str, Any]:
    """Settings as JSON values, without where they came from."""
    kept = {name: value for name, value in dict(config).items() if name[:1] != "_" and name not in _PROVENANCE}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def _lora_words(lora: Sequence[LoraPrint]) -> str:
    if not lora:
        return "none"
    return ", ".join(f"{(one.weights or 'unknown')[:8]} at scale {one.scale}" for one in lora)


def _sampler_words(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)}, now {now.get(name)}" for name in names)
