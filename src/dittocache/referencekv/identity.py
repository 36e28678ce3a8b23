"""What the keys and values of isolated references depend on: two calls with equal identities make the same ones.

Contents are compared, not addresses: the allocator hands out the same address again for another picture.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dittocache.families.active_adapters import adapters_of
from dittocache.families.transformer_side import TokenLayout, TransformerAdapter

Version = tuple[weakref.ref[torch.Tensor], int]


@dataclass(frozen=True, eq=False)
class ReferenceIdentity:
    """References of one call of the transformer, and whatever else decides about their K and V.

    Attributes:
        tensors: contents: the packed latents of the references `(B, R, C)` first.
        facts: values, compared by `==`: shapes, dtypes, devices, active LoRA and their scales, settings of attention.
        weights: the parameters as they are now.
        image: the tensor that the references were passed in. Pipelines pass the same one to all CFG branches of a
            step: then nothing need be read to know that the references are the same.
    """

    tensors: tuple[torch.Tensor, ...]
    facts: tuple[object, ...]
    weights: tuple[Version, ...]
    image: Version

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
        weights = tuple(_version(parameter) for parameter in module.parameters())
        image = _version(forward_kwargs["hidden_states"])
        return cls(tensors, (described, values, adapters_of(module)), weights, image)

    def kept(self) -> ReferenceIdentity:
        """The same with copies of its own, for a comparison later."""
        return replace(self, tensors=tuple(tensor.detach().clone() for tensor in self.tensors))

    def matches(self, other: ReferenceIdentity) -> bool:
        """Whether K and V are the same; reads at most one number from the device."""
        if self.facts != other.facts or len(self.weights) != len(other.weights):
            return False
        if not all(map(_unchanged, self.weights, other.weights)):
            return False
        skip = int(_unchanged(self.image, other.image))
        pairs = zip(self.tensors[skip:], other.tensors[skip:], strict=True)
        apart = [(one != two).any() for one, two in pairs if one is not two]
        return not apart or not bool(torch.stack([found.to(apart[0].device) for found in apart]).any())


def _version(tensor: torch.Tensor) -> Version:
    """A tensor, and how often it was written to; -1 for one of inference mode, of which nobody knows.

    Only writing through `.data` goes unnoticed. Merging a LoRA does that, and is among the facts.
    """
    return weakref.ref(tensor), -1 if tensor.is_inference() else tensor._version


def _unchanged(before: Version, now: Version) -> bool:
    return before[1] == now[1] >= 0 and before[0]() is now[0]() is not None
