"""Forms in which the keys and values of references are kept: what is stored, and how K and V come back.

Shapes: B batch, R reference tokens, H heads, d head width, D width of the block's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class ReferenceSource:
    """What K and V of one block's references are computed from.

    Attributes:
        modulated: what the attention module was given for them, `(B, R, D)`.
        frequencies: their RoPE frequencies, the same for all blocks.
        project: gives K and V from these two.
    """

    modulated: torch.Tensor
    frequencies: tuple[torch.Tensor, ...]
    project: Callable[[torch.Tensor, tuple[torch.Tensor, ...]], KeyValue]


@dataclass(frozen=True)
class Packed:
    """What is kept of one block.

    Attributes:
        tensors: may be moved elsewhere and back.
        restore: K and V, `(B, R, H, d)`, from these tensors.
        fresh: whether nothing else lies in their memory. A slice would keep the keys of all tokens alive.
    """

    tensors: tuple[torch.Tensor, ...]
    restore: Callable[[tuple[torch.Tensor, ...]], KeyValue]
    fresh: bool = False


class StorageForm(Protocol):
    """One way to keep K and V.

    Attributes:
        name: the word used in settings.
        lossy: whether K and V come back changed.
        from_key_value: whether they are all that it is made from, so that another form can be turned into it.
    """

    name: str
    lossy: bool
    from_key_value: bool

    def pack(self, key: torch.Tensor, value: torch.Tensor, source: ReferenceSource | None) -> Packed:
        """Keep K and V, `(B, R, H, d)`."""
        ...

    def bytes_per_token(self, heads: int, head_width: int, width: int, element_size: int) -> int:
        """Bytes of one reference token in one block."""
        ...


class Native:
    """K and V as they were computed."""

    name = "native"
    lossy = False
    from_key_value = True

    def pack(self, key: torch.Tensor, value: torch.Tensor, source: ReferenceSource | None) -> Packed:
        """Themselves."""
        return Packed((key, value), _pair)

    def bytes_per_token(self, heads: int, head_width: int, width: int, element_size: int) -> int:
        """2 H d elements."""
        return 2 * heads * head_width * element_size


class Float8:
    """K and V in e4m3, 8 bits, with a scale for each token and head: about half the memory of 16 bits.

    An element comes back within 2^-4 of itself (half a step of a mantissa of 3 bits); those under 2^-15 of the largest
    of their head and token come back within 2^-10 of the scale, which is that largest one / 448.
    """

    name = "fp8"
    lossy = True
    from_key_value = True

    def pack(self, key: torch.Tensor, value: torch.Tensor, source: ReferenceSource | None) -> Packed:
        """K, V, and their scales in the dtype of K."""
        dtype = key.dtype

        def restore(tensors: tuple[torch.Tensor, ...]) -> KeyValue:
            small_key, key_scale, small_value, value_scale = tensors
            return small_key.to(dtype) * key_scale, small_value.to(dtype) * value_scale

        return Packed((*_to_float8(key), *_to_float8(value)), restore, fresh=True)

    def bytes_per_token(self, heads: int, head_width: int, width: int, element_size: int) -> int:
        """2 H d bytes and 2 H scales."""
        return 2 * heads * (head_width + element_size)


class ModulatedInput:
    """What K and V are projected from: half their memory and no error, for 4 D^2 operations a token at every step."""

    name = "modulated_input"
    lossy = False
    from_key_value = False

    def pack(self, key: torch.Tensor, value: torch.Tensor, source: ReferenceSource | None) -> Packed:
        """The block's modulated input."""
        if source is None:
            raise RuntimeError("the modulated input of the references is to be kept, but was not passed on")
        frequencies, project = source.frequencies, source.project
        return Packed((source.modulated,), lambda tensors: project(tensors[0], frequencies))

    def bytes_per_token(self, heads: int, head_width: int, width: int, element_size: int) -> int:
        """D elements."""
        return width * element_size


NATIVE, FP8, MODULATED_INPUT = Native(), Float8(), ModulatedInput()


def _pair(tensors: tuple[torch.Tensor, ...]) -> KeyValue:
    key, value = tensors
    return key, value


def _to_float8(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 `(B, R, H, d)`, scale `(B, R, H, 1)`); the product of the two is `tensor`, nearly."""
    largest = tensor.detach().abs().amax(dim=-1, keepdim=True)
    # The scale is rounded before it divides: what is multiplied with later is exactly what was divided by.
    scale = (largest.float() / torch.finfo(FLOAT8).max).clamp_min(torch.finfo(tensor.dtype).tiny).to(tensor.dtype)
    return (tensor.detach() / scale).to(FLOAT8), scale
