"""What stands in for the transformer blocks on a skipped step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dittocache.errors import StepCacheError
from dittocache.families.base import CacheContext


@dataclass(frozen=True)
class StackPass:
    """Input and output `(B, N, D)` of the block stack at a computed step, noise tokens only."""

    stack_input: torch.Tensor
    stack_output: torch.Tensor


class Prediction(Protocol):
    """Learns from computed steps and stands in for the blocks on skipped ones; state of one run and branch."""

    @property
    def ready(self) -> bool:
        """Whether enough steps were computed to predict one."""
        ...

    @property
    def bytes_held(self) -> int:
        """Memory that the state holds on the device."""
        ...

    def observe(self, computed: StackPass) -> None:
        """Learn from a computed step."""
        ...

    def predict(self, context: CacheContext) -> Any:
        """What the model's forward would return for this skipped step."""
        ...


class ResidualReuse:
    """The last residual once more: output = input + (output - input of the last computed step). The spec's way."""

    def __init__(self) -> None:
        self._residual: torch.Tensor | None = None

    @property
    def ready(self) -> bool:
        """After the first computed step."""
        return self._residual is not None

    @property
    def bytes_held(self) -> int:
        """Bytes of the residual."""
        return 0 if self._residual is None else self._residual.numel() * self._residual.element_size()

    def observe(self, computed: StackPass) -> None:
        """Keep output - input, `(B, N, D)`."""
        self._residual = (computed.stack_output - computed.stack_input).detach()

    def predict(self, context: CacheContext) -> Any:
        """Add the residual and finish with the model's own norm and projection; StepCacheError before `ready`."""
        if self._residual is None:
            raise StepCacheError("no step of this run and branch was computed yet; there is no residual to reuse")
        return context.postprocess(context.hidden_states + self._residual)
