"""Keys and values of references at steps that do not compute them: the last ones, or a line through the last two.

References drift smoothly with the noise level, so that once they are refreshed regularly a line in sigma is worth
several dB. It is followed no farther than `policy.REACH` says: continued over a whole run, the slope of the first steps
is worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dittocache.referencekv.policy import Kept, RefreshRule, slope_weight
from dittocache.referencekv.storage import ReferenceSource
from dittocache.referencekv.store import BranchKV
from dittocache.referencekv.watch import ReferenceWatch


class BranchReferences:
    """What one CFG branch of one run keeps of its references, `(B, R, H, d)` a block.

    Args:
        rule: when they are refreshed.
        newest: takes the first refresh.
        older: takes the second one, whereupon the two take turns; None: the last refresh alone is kept.
        blocks: the numbers of those that keep references, in order; the keys of three of them are compared with their
            prediction at a refresh.
    """

    def __init__(self, rule: RefreshRule, newest: BranchKV, older: BranchKV | None, blocks: Sequence[int]) -> None:
        self.rule = rule
        self.watch = ReferenceWatch()
        self.drift: torch.Tensor | None = None
        """`|K - K predicted| / |K|` at the last refresh, 0-dim on the device; None where nothing was predicted."""
        self._newest = newest
        self._older = older
        self._metered = {blocks[len(blocks) * quarter // 4] for quarter in (1, 2, 3)}
        self._reused = newest.reused  # computed steps since the last refresh; None before the first
        self._step = 0
        self._sigmas: list[float] = []  # of the last refreshes, the newest first
        self._drift_read: float | None = None
        self._slope: torch.Tensor | None = None  # 0-dim, so that no number is compiled into a block
        self._expected: dict[int, torch.Tensor] = {}
        self._squares: list[torch.Tensor] = []

    @property
    def is_filled(self) -> bool:
        """Whether there is something to reuse."""
        return self._reused is not None

    def since(self, sigma: float) -> Kept | None:
        """What the policy asks for at a step of noise level `sigma`; reads one number from the device a refresh."""
        if self._reused is None:
            return None
        if self.rule.tolerance is None or self.drift is None:
            return Kept(self._reused, self._step)
        if self._drift_read is None:
            self._drift_read = float(self.drift)
        now, before = self._sigmas[:2]
        return Kept(self._reused, self._step, self._drift_read, abs(before - now), abs(now - sigma))

    def begin_filling(self, step: int, sigma: float) -> None:
        """References are about to be computed; what was predicted for them is set aside where it is metered."""
        self.drift = self._drift_read = None
        self._squares, self._expected = [], {}
        if self._reused is not None:
            self.aim(sigma)
            self._expected = {block: self.take(block)[0] for block in sorted(self._metered)}
        if self._reused is not None and self._older is not None:
            self._newest, self._older = self._older, self._newest
        self._newest.begin_filling()
        self._sigmas = [sigma, *self._sigmas][:2]
        self._step, self._reused = step, None

    def put(self, block: int, key: torch.Tensor, value: torch.Tensor, source: ReferenceSource | None = None) -> None:
        """Keep copies of K and V of one block, and measure how far its keys are from what was predicted."""
        expected = self._expected.pop(block, None)
        if expected is not None:
            found = key.detach().float()
            apart = (found - expected.float()).square().sum()
            self._squares.append(torch.stack([apart, found.square().sum()]))
        self._newest.put(block, key, value, source)

    def filled(self) -> None:
        """Every block has put its keys and values."""
        self._newest.filled()
        self._reused = 0
        if self._squares:
            apart, whole = torch.stack([squares.to(self._squares[0].device) for squares in self._squares]).sum(dim=0)
            self.drift = (apart / whole).sqrt()

    def aim(self, sigma: float) -> None:
        """The next `take` are for this noise level."""
        weight = slope_weight(self._sigmas, sigma) if self._older is not None else 0.0
        self._slope = None
        if weight != 0 and self._newest.like is not None:
            self._slope = self._newest.like.new_full((), 1 + weight)

    def take(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one block at the noise level aimed at."""
        key, value = self._newest.take(block)
        if self._slope is None or self._older is None:
            return key, value
        slope = self._slope if self._slope.device == key.device else self._slope.to(key.device)
        key_before, value_before = self._older.take(block)
        return torch.lerp(key_before, key, slope), torch.lerp(value_before, value, slope)

    def reuse(self) -> None:
        """A step has run on what is kept."""
        if self._reused is not None:
            self._reused += 1
