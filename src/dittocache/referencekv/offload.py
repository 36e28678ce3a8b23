"""Kept tensors in the host's memory, brought to the device block by block, one block ahead of its use.

On CUDA copies run on a stream of their own, beside the computation, from and to pinned memory. What is brought in is
allocated on the stream that computes, in its order: memory that a block frees is taken by the copy that is ordered
behind that block, so that no more than about two blocks' worth is on the device at a time. On other devices copies are
plain, and wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dittocache.errors import ReferenceCacheError

Tensors = tuple[torch.Tensor, ...]


class Link(Protocol):
    """Copies between one device and the host, in the order in which they are asked for."""

    def send(self, tensors: Tensors, into: Tensors | None) -> Tensors:
        """Copies on the host, maybe still under way; `into` is overwritten where it is given and fits."""
        ...

    def fetch(self, tensors: Tensors) -> Arriving:
        """Begin to bring them to the device."""
        ...


class Arriving(Protocol):
    """Tensors on their way to the device."""

    def landed(self) -> Tensors:
        """They, for computations that are asked for from here on."""
        ...


@dataclass(frozen=True)
class _Landed:
    tensors: Tensors

    def landed(self) -> Tensors:
        return self.tensors


class PlainLink:
    """Copies that are over when they return."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, tensors: Tensors, into: Tensors | None) -> Tensors:
        """Copies in ordinary memory."""
        if into is not None and _fits(tensors, into):
            return tuple(host.copy_(tensor) for host, tensor in zip(into, tensors, strict=True))
        return tuple(tensor.detach().to("cpu", copy=True) for tensor in tensors)

    def fetch(self, tensors: Tensors) -> Arriving:
        """Copies on the device."""
        return _Landed(tuple(tensor.to(self._device, copy=True) for tensor in tensors))


class CudaLink:
    """Copies on a side stream between a CUDA device and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, tensors: Tensors, into: Tensors | None) -> Tensors:
        """Copies in pinned memory, valid for what the side stream does later: `fetch`."""
        if into is None or not _fits(tensors, into):
            into = tuple(_pinned(tensor) for tensor in tensors)
        self._side.wait_stream(torch.cuda.current_stream(self._device))  # they are computed there
        with torch.cuda.stream(self._side):
            for host, tensor in zip(into, tensors, strict=True):
                host.copy_(tensor.detach(), non_blocking=True)
        for tensor in tensors:
            tensor.record_stream(self._side)  # its memory is not given away before the copy is over
        return into

    def fetch(self, tensors: Tensors) -> Arriving:
        """Begin behind everything that has been asked for so far, beside everything that is asked for from now on."""
        computing = torch.cuda.current_stream(self._device)
        arriving = tuple(torch.empty_like(tensor, device=self._device, pin_memory=False) for tensor in tensors)
        self._side.wait_stream(computing)  # whoever had this memory before has done with it
        with torch.cuda.stream(self._side):
            for tensor, host in zip(arriving, tensors, strict=True):
                tensor.copy_(host, non_blocking=True)
            over = self._side.record_event()
        return _CudaArriving(arriving, over, computing)


class _CudaArriving:
    def __init__(self, tensors: Tensors, over: torch.cuda.Event, computing: torch.cuda.Stream) -> None:
        self._tensors = tensors
        self._over = over
        self._computing = computing

    def landed(self) -> Tensors:
        torch.cuda.current_stream(self._tensors[0].device).wait_event(self._over)
        return self._tensors

    def __del__(self) -> None:
        # Nobody may have asked for them: what gets their memory next must not be overwritten by the copy.
        self._computing.wait_event(self._over)


def link_to(device: torch.device) -> Link:
    """Copies between this device and the host."""
    return CudaLink(device) if device.type == "cuda" else PlainLink(device)


class DeviceBlocks:
    """What is kept of each block, where it was computed."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensors] = {}
        self.device_bytes = 0
        self.host_bytes = 0

    def empty(self) -> None:
        """Nothing is kept."""
        self._kept, self.device_bytes = {}, 0

    def put(self, block: int, tensors: Tensors) -> None:
        """Keep these, not copies."""
        self.drop(block)
        self._kept[block] = tensors
        self.device_bytes += _bytes(tensors)

    def drop(self, block: int) -> None:
        """Free those of `block`."""
        self.device_bytes -= _bytes(self._kept.pop(block, ()))

    def take(self, block: int) -> Tensors:
        """Those of `block`."""
        return self._kept[block]


class OffloadedBlocks:
    """What is kept of each block, on the host; the next block's is brought in while one is computed.

    Args:
        link_to: makes the link to a device; a transformer may be spread over several.
    """

    def __init__(self, link_to: Callable[[torch.device], Link]) -> None:
        self._link_to = link_to
        self._links: dict[torch.device, Link] = {}
        self._link_of: dict[int, Link] = {}
        self._host: dict[int, Tensors] = {}
        self._filled: set[int] = set()
        self._arriving: dict[int, Arriving] = {}

    @property
    def host_bytes(self) -> int:
        """Memory on the host, that of blocks to be filled anew included."""
        return sum(map(_bytes, self._host.values()))

    @property
    def device_bytes(self) -> int:
        """Memory on the device at most: two blocks."""
        return sum(sorted(_bytes(self._host[block]) for block in self._filled)[-2:])

    def empty(self) -> None:
        """Nothing may be read until it is put anew; memory on the host is taken again."""
        self._filled, self._arriving = set(), {}

    def put(self, block: int, tensors: Tensors) -> None:
        """Keep copies of these."""
        self._arriving.pop(block, None)
        device = tensors[0].device
        if device not in self._links:
            self._links[device] = self._link_to(device)
        self._link_of[block] = self._links[device]
        self._host[block] = self._links[device].send(tensors, self._host.get(block))
        self._filled.add(block)

    def drop(self, block: int) -> None:
        """Free those of `block`."""
        self._arriving.pop(block, None)
        self._host.pop(block, None)
        self._filled.discard(block)

    def take(self, block: int) -> Tensors:
        """Those of `block` on the device; those of the block behind it set out, of the first behind the last."""
        arriving = self._arriving.pop(block, None) or self._fetch(block)
        following = min((other for other in self._filled if other > block), default=min(self._filled))
        # Others were fetched for a step that took another way; they would fill the device.
        kept = self._arriving.get(following)
        self._arriving = {} if following == block else {following: kept or self._fetch(following)}
        return arriving.landed()

    def _fetch(self, block: int) -> Arriving:
        return self._link_of[block].fetch(self._host[block])


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _fits(tensors: Tensors, into: Tensors) -> bool:
    if into[0].is_inference() and not torch.is_inference_mode_enabled():
        return False
    return [(one.shape, one.dtype) for one in tensors] == [(one.shape, one.dtype) for one in into]


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError as error:
        raise ReferenceCacheError(
            f"no pinned memory on the host for {tensor.nbytes / 1e6:.0f} MB of references' keys and values ({error}); "
            "turn offload off, or use fewer or smaller references"
        ) from error
