"""Host memory that batches are read into: used again once nothing of a batch is left.

Fresh memory costs a page fault per 4 KiB, and pinning it costs far more; a training run needs the same few buffers over
and over.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 64  # a cache line
_GRANULE = 2 << 20  # sizes are rounded up, so that batches of nearly one size share buffers


def carve(buffers: Buffers, forms: Sequence[tuple[torch.dtype, Sequence[int]]]) -> list[torch.Tensor]:
    """Tensors of these dtypes and shapes, of unspecified content, side by side in one buffer."""
    places, length = [], 0
    for dtype, shape in forms:
        places.append(length)
        length += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    whole = torch.from_numpy(buffers.take(length))
    return [
        whole[place : place + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)
        for place, (dtype, shape) in zip(places, forms, strict=True)
    ]


class Buffers:
    """A pool of byte buffers that come back by themselves.

    Args:
        pin: page-locked memory, from which a GPU copies without the CPU; by default where CUDA is available.
        keep: buffers that are kept while nothing uses them.
    """

    def __init__(self, pin: bool | None = None, keep: int = 8) -> None:
        self.pin = torch.cuda.is_available() if pin is None else pin
        self._keep = keep
        self._free: list[_Memory] = []
        self._lock = threading.RLock()  # a finalizer may run in the middle of `take`, in the same thread

    def take(self, length: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """`length` bytes of unspecified content, writable.

        They belong to the caller and to every tensor or memoryview made from the array; when the last of these is
        gone, the memory may be given out again.
        """
        memory = self._fitting(length) or _Memory(length, self.pin)
        memory.wait()
        window = memory.bytes[:length]
        weakref.finalize(window, self._take_back, memory).atexit = False
        return window

    def _fitting(self, length: int) -> _Memory | None:
        with self._lock:
            fitting = [memory for memory in self._free if len(memory.bytes) >= length]
            if not fitting:
                return None
            chosen = min(fitting, key=lambda memory: len(memory.bytes))
            self._free.remove(chosen)
            return chosen

    def _take_back(self, memory: _Memory) -> None:
        memory.note_use()
        with self._lock:
            self._free.append(memory)
            if len(self._free) > self._keep:
                self._free.remove(min(self._free, key=lambda memory: len(memory.bytes)))


class _Memory:
    """One buffer, and the moment up to which a GPU may still copy from it."""

    def __init__(self, length: int, pin: bool) -> None:
        size = max(1, -(-length // _GRANULE)) * _GRANULE
        self._pinned = pin
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pin).numpy()
        self._used: torch.cuda.Event | None = None

    def note_use(self) -> None:
        """A copy that was started with `non_blocking=True` outlives its tensor: remember where the stream stands."""
        if self._pinned:
            self._used = torch.cuda.current_stream().record_event()

    def wait(self) -> None:
        """Return once no copy that was started before `note_use` reads this memory any more."""
        if self._used is not None:
            self._used.synchronize()
            self._used = None
