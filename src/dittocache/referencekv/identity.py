"""What the keys and values of isolated references depend on: two calls with equal identities make the same ones.

Contents are compared, not addresses: the allocator hands out the same address again for another picture.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dittocache.families.active_adapters import adapters_of
from dittocache.families.base import TokenLayout, TransformerAdapter


@dataclass(frozen=True, eq=False)
class ReferenceIdentity:
    """References of one call of the transformer, and whatever else decides about their K and V.

    Attributes:
        tensors: contents: the packed latents of the references `(B, R, C)` first.
        facts: values, compared by `==`: shapes, dtypes, devices, active LoRA and their scales, settings of attention.
        weights: the parameters as they are now, see `weight_versions`; empty where they are known not to change.
    """

    tensors: tuple[torch.Tensor, ...]
    facts: tuple[object, ...]
    weights: tuple[tuple[weakref.ref[nn.Parameter], int], ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        adapter: TransformerAdapter,
        forward_kwargs: Mapping[str, Any],
        layout: TokenLayout,
        own: str = "",
    ) -> ReferenceIdentity:
        """The identity of this call's references; copies nothing, reads nothing from the device.

        Args:
            own: a name among the attention arguments that is dittocache's own, and left out.
        """
        asked = forward_kwargs.get(adapter.attention_kwargs_name) or {}
        named = [(name, asked[name]) for name in sorted(asked) if name != own]
        tokens = forward_kwargs["hidden_states"][:, layout.noise : layout.noise + layout.reference]
        parts = [tokens, *adapter.reference_facts(forward_kwargs, layout), *(part for pair in named for part in pair)]
        tensors = tuple(part for part in parts if isinstance(part, torch.Tensor))
        described = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        values = tuple(part for part in parts if not isinstance(part, torch.Tensor))
        return cls(tensors, (described, values, adapters_of(module)), weight_versions(module))

    def kept(self) -> ReferenceIdentity:
        """The same with copies of its own, for a comparison later."""
        return ReferenceIdentity(tuple(tensor.detach().clone() for tensor in self.tensors), self.facts, self.weights)

    def matches(self, other: ReferenceIdentity) -> bool:
        """Whether K and V are the same; reads one number from the device where everything else is."""
        if self.facts != other.facts or not _same_weights(self.weights, other.weights):
            return False
        apart = [(one != two).any() for one, two in zip(self.tensors, other.tensors, strict=True) if one is not two]
        return not apart or not bool(torch.stack([found.to(apart[0].device) for found in apart]).any())


def weight_versions(module: nn.Module) -> tuple[tuple[weakref.ref[nn.Parameter], int], ...]:
    """Every parameter and how often it was written to, so that other weights under the same names are noticed.

    Only writing through `.data` goes unnoticed; merging a LoRA does that, and is among the facts.
    """
    return tuple(
        (weakref.ref(parameter), 0 if parameter.is_inference() else parameter._version)
        for parameter in module.parameters()
    )


def _same_weights(
    one: tuple[tuple[weakref.ref[nn.Parameter], int], ...], other: tuple[tuple[weakref.ref[nn.Parameter], int], ...]
) -> bool:
    return len(one) == len(other) and all(
        before[1] == now[1] and before[0]() is now[0]() is not None for before, now in zip(one, other, strict=True)
    )
