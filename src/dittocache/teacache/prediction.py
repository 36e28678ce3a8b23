"""What stands in for the transformer blocks on a skipped step.

Two choices are made apart: *what* is predicted, the residual of the block stack (the spec) or the model's output, and
*how*: the last value once more, or the line through the last two computed ones, continued in sigma. In rectified flow
the output is the velocity of an ODE in sigma, so that the line is what a multistep solver would take; on the bundled
model it is worth more than a better choice of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dittocache.errors import StepCacheError
from dittocache.families.transformer_side import CacheContext
from dittocache.teacache.outputs import sample_of, with_sample
from dittocache.teacache.signal import relative_distance

Subject = Literal["residual", "output"]


def _whole(sample: torch.Tensor) -> torch.Tensor:
    return sample


@dataclass(frozen=True)
class StackPass:
    """Input and output `(B, tokens, D)` of the block stack at a computed step.

    `noise_of` takes the noise's part `(B, N, ...)` of either, and of the model's output.
    """

    stack_input: torch.Tensor
    stack_output: torch.Tensor
    noise_of: Callable[[torch.Tensor], torch.Tensor] = _whole

    @property
    def residual(self) -> torch.Tensor:
        """What the blocks added to the noise tokens, `(B, N, D)`."""
        return self.noise_of(self.stack_output) - self.noise_of(self.stack_input)


def noise_sample(passed: StackPass | None, output: Any) -> torch.Tensor:
    """The predicted velocity of the noise in what the model returned; all of it where the blocks are not known."""
    sample = sample_of(output)
    return sample if passed is None else passed.noise_of(sample)


class Prediction:
    """Learns from the computed steps of one run and branch, and stands in for the blocks on its skipped ones.

    Rows of a batch may have been computed at different steps.

    Args:
        subject: what is kept: `residual` = output - input of the block stack, or the model's `output`.
        order: 0 gives the last value again; 1 continues the line through the last two in sigma.
    """

    def __init__(self, subject: Subject = "residual", order: int = 0) -> None:
        self.subject: Subject = subject
        self.order = order
        self._now: torch.Tensor | None = None  # (B, N, D or C)
        self._before: torch.Tensor | None = None
        self._sigmas_now: list[float] = []  # of each row
        self._sigmas_before: list[float | None] = []
        self._output: Any = None  # the last computed one without its tensors: what kind of thing to return

    def ready(self, row: int) -> bool:
        """Whether enough steps of this row were computed to predict one."""
        if self._now is None:
            return False
        return self.order == 0 or self._sigmas_before[row] is not None

    @property
    def bytes_held(self) -> int:
        """Memory that the state holds on the device."""
        return sum(kept.numel() * kept.element_size() for kept in (self._now, self._before) if kept is not None)

    def value(self, passed: StackPass | None, output: Any) -> torch.Tensor:
        """What is kept of a computed step, noise tokens only; `passed` is None where the blocks are not known."""
        if self.subject == "residual" and passed is not None:
            return passed.residual.detach()
        whole, noise = sample_of(output), noise_sample(passed, output).detach()
        # A view would keep the reference tokens' part of the output alive.
        return noise if noise.shape == whole.shape else noise.clone()

    def defect(self, value: torch.Tensor, sigma: float, rows: Sequence[int]) -> torch.Tensor | None:
        """How far the prediction for `rows` would have been from `value`, relative, `(rows,)` float32 on the device.

        None where there is not enough to predict from. Call it before `observe`.
        """
        if not all(self.ready(row) for row in rows):
            return None
        return relative_distance(self._at(sigma)[_index(rows, self._rows)], value)

    def observe(self, value: torch.Tensor, sigma: float, output: Any, rows: Sequence[int]) -> None:
        """Keep what `value` gave for the rows that were computed."""
        self._output = with_sample(output, value[:0])
        if self._now is None or len(rows) == self._rows:
            self._keep_all(value, sigma, rows)
            return
        index = torch.tensor(list(rows), device=value.device)
        if self.order > 0:
            before = self._now.clone() if self._before is None else self._before
            self._before = before.index_copy(0, index, self._now.index_select(0, index))
        self._now = self._now.index_copy(0, index, value)
        for row in rows:
            self._sigmas_before[row], self._sigmas_now[row] = self._sigmas_now[row], sigma

    def predict(self, sigma: float, context: Callable[[], CacheContext]) -> Any:
        """What the model's forward would return for this skipped step, all rows; StepCacheError before `ready`.

        `context` takes the forward pass apart; it is called where the model's own last layers are needed.
        """
        value = self._at(sigma)
        if self.subject == "output":
            return with_sample(self._output, value)
        found = context()
        return found.postprocess(found.hidden_states + value)

    @property
    def _rows(self) -> int:
        return len(self._sigmas_now)

    def _keep_all(self, value: torch.Tensor, sigma: float, rows: Sequence[int]) -> None:
        first = self._now is None
        if self.order > 0:
            self._before = self._now
        self._sigmas_before = [None] * len(rows) if first else list(self._sigmas_now)
        self._now, self._sigmas_now = value, [sigma] * len(rows)

    def _at(self, sigma: float) -> torch.Tensor:
        """The value predicted for `sigma`, `(B, N, D or C)`."""
        if self._now is None:
            raise StepCacheError("no step of this run and branch was computed yet; there is nothing to predict from")
        if self.order == 0 or self._before is None:
            return self._now
        weights = [
            1.0 if before is None or before == now else (sigma - before) / (now - before)
            for now, before in zip(self._sigmas_now, self._sigmas_before, strict=True)
        ]
        if len(set(weights)) == 1:
            return torch.lerp(self._before, self._now, weights[0])
        by_row = torch.tensor(weights, dtype=self._now.dtype, device=self._now.device).view(-1, 1, 1)
        return torch.lerp(self._before, self._now, by_row)


def _index(rows: Sequence[int], total: int) -> Any:
    return slice(None) if len(rows) == total else list(rows)
