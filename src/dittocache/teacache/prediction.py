"""What stands in for the transformer blocks on a skipped step.

Two choices are made apart: *what* is predicted, and *how*: the last value once more, or the line through the last two
computed ones, continued in sigma. What is predicted is one of

- the residual of the block stack (the spec);
- the model's output v, in rectified flow the velocity of an ODE in sigma: its line is what a multistep solver takes;
- the noise eps = x + (1 - sigma) v that the model sees in the latents x. A skipped step then has the velocity
  (eps - x) / (1 - sigma) of the latents as they are *now*: it answers to what earlier skipped steps did to them.
  With a guidance of 4, where v bends most, this is worth 3 dB behind the error gate and 6 to 11 dB in a fixed schedule
  on the bundled model; without guidance it is about even (docs/sampling-caches.md).
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

Subject = Literal["residual", "output", "noise"]

NEAREST_TO_NOISE = 1e-3
"""1 - sigma is taken to be no smaller, which keeps its division finite; the first step is computed anyway."""


Latents = Callable[[], torch.Tensor | None]


def unknown() -> torch.Tensor | None:
    """Latents that nobody knows."""
    return None


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
        subject: what is kept: `residual` = output - input of the block stack, the model's `output`, or the `noise`.
        order: 0 gives the last value again; 1 continues the line through the last two in sigma.
        instead: what is kept where the model's input does not hold the latents that its output moves; without it that
            is an error.
    """

    def __init__(self, subject: Subject = "residual", order: int = 0, instead: Subject | None = None) -> None:
        self.subject: Subject = subject
        self.order = order
        self._instead = instead
        self._now: torch.Tensor | None = None  # (B, N, D or C)
        self._before: torch.Tensor | None = None
        self._sigmas_now: list[float] = []  # of each row
        self._sigmas_before: list[float | None] = []
        self._dtype = torch.float32  # of the output
        self._output: Any = None  # the last computed one without its tensors: what kind of thing to return

    def ready(self, row: int) -> bool:
        """Whether enough steps of this row were computed to predict one."""
        if self._now is None:
            return False
        return self.order == 0 or self._sigmas_before[row] is not None

    @property
    def needs_sigma(self) -> bool:
        """Whether anything depends on the noise level of a step."""
        return self.order > 0 or self.subject == "noise"

    @property
    def bytes_held(self) -> int:
        """Memory that the state holds on the device."""
        return sum(kept.numel() * kept.element_size() for kept in (self._now, self._before) if kept is not None)

    def value(
        self, passed: StackPass | None, output: Any, sigma: float = 0.0, latents: Latents = unknown
    ) -> torch.Tensor:
        """What is kept of a computed step, noise tokens only.

        Args:
            passed: None where the blocks are not known.
            output: what the model returned.
            sigma: noise level.
            latents: gives the latents `(B, N, C)` of the same rows as the solver has them; None where the model's input
                does not hold them.
        """
        if self.subject == "residual" and passed is not None:
            return passed.residual.detach()
        whole, velocity = sample_of(output), noise_sample(passed, output).detach()
        if self.subject == "noise":
            noisy = latents()
            if noisy is not None and noisy.shape == velocity.shape:
                self._dtype = velocity.dtype
                return torch.add(noisy, velocity.float(), alpha=1 - sigma)
            if self._instead is None:
                found = "does not hold them" if noisy is None else f"has {tuple(noisy.shape)}"
                raise StepCacheError(
                    "to predict the noise, the latents that the transformer's output moves must be in its input, "
                    f"as {tuple(velocity.shape)}; this one {found}. Choose prediction 'output_linear'"
                )
            self.subject = self._instead
        # A view would keep the reference tokens' part of the output alive.
        return velocity if velocity.shape == whole.shape else velocity.clone()

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

    def predict(self, sigma: float, context: Callable[[], CacheContext], latents: Latents = unknown) -> Any:
        """What the model's forward would return for this skipped step, all rows; StepCacheError before `ready`.

        `context` takes the forward pass apart; it is called where the model's own last layers are needed. `latents`
        gives those of all rows as the solver has them.
        """
        value = self._at(sigma)
        if self.subject == "output":
            return with_sample(self._output, value)
        if self.subject == "noise":
            now = latents()
            assert now is not None  # `value` had them
            velocity = (value - now) / max(1 - sigma, NEAREST_TO_NOISE)
            return with_sample(self._output, velocity.to(self._dtype))
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
