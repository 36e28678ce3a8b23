"""Whether the references stay the same within a run: by what they hold, not by where they lie in memory.

An address says nothing: the allocator hands it out again. On a GPU the comparison is left to the device and its answer
is read at the next step, when it has long been there; nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch

from dittocache.errors import ReferenceCacheError


class ReferenceWatch:
    """Watches the reference tokens `(B, R, C)` of one branch from step to step."""

    def __init__(self) -> None:
        self._kept: torch.Tensor | None = None
        self._asked: tuple[torch.Tensor, torch.cuda.Event] | None = None

    @property
    def bytes_held(self) -> int:
        """Device memory of the copy."""
        return 0 if self._kept is None else self._kept.numel() * self._kept.element_size()

    def keep(self, references: torch.Tensor) -> None:
        """These are what the cache is filled from."""
        self._kept, self._asked = references.detach().clone(), None

    def holds(self, references: torch.Tensor, at_once: bool) -> bool:
        """Whether `references` are the kept ones.

        Args:
            at_once: wait for the device. Else the answer is yes for now, and a no comes out in `settle`.
        """
        if self._kept is None or self._kept.shape != references.shape or self._kept.dtype != references.dtype:
            return False
        kept, found = _bits(self._kept), _bits(references.detach())
        if at_once or not references.is_cuda:
            return torch.equal(kept, found)
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_((kept == found).all(), non_blocking=True)
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(references.device))  # a pipeline may be spread over several devices
        self._asked = answer, event
        return True

    def settle(self) -> None:
        """Read the answer about the step before; raises ReferenceCacheError where its references were others."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        answer, event = asked
        event.synchronize()  # the step before has begun by now: its answer came before its blocks
        if not answer.item():
            raise ReferenceCacheError(
                "the reference pictures changed in the middle of a denoising run, and one step has used the keys and "
                "values of those before; keep image_latents as they are within a run, or leave the reference KV cache "
                "off for it"
            )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: NaN is equal to itself."""
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(as_integers[tensor.element_size()])
