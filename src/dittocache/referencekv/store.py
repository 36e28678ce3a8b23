"""Keys and values of reference tokens: one slot a block, one set of slots a CFG branch, one run at a time."""

from __future__ import annotations

from collections.abc import Collection

import torch


class BranchKV:
    """What one CFG branch keeps: K after norm and RoPE, and V, of the R reference tokens, `(B, R, H, d)` a block."""

    def __init__(self, blocks: int) -> None:
        self._slots: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * blocks
        self.reused: int | None = None
        """Computed steps since the slots were filled; None while they are not all filled."""
        self.bytes_held = 0

    def begin_filling(self) -> None:
        """Empty the slots: until `filled()` they hold nothing that may be read."""
        self._slots = [None] * len(self._slots)
        self.reused = None
        self.bytes_held = 0

    def put(self, block: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep copies: a slice would keep the keys of all tokens alive."""
        kept = key.detach().clone(), value.detach().clone()
        self._slots[block] = kept
        self.bytes_held += sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def filled(self) -> None:
        """Every block has put its keys and values."""
        self.reused = 0

    def take(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one block; RuntimeError where the block never ran, which only a broken forward can do."""
        slot = self._slots[block]
        if slot is None:
            raise RuntimeError(f"block {block} has no reference keys and values, although the step before was full")
        return slot


class RunKV:
    """All branches of the runs that are under way."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._branches: dict[tuple[int, str], BranchKV] = {}

    def branch(self, run: int, name: str) -> BranchKV:
        """The branch of this run and name, empty at first."""
        return self._branches.setdefault((run, name), BranchKV(self._blocks))

    def knows(self, run: int) -> bool:
        """Whether something of this run is kept."""
        return any(known == run for known, _ in self._branches)

    def clear(self, but: Collection[int] = ()) -> None:
        """Free everything, or all but what belongs to some runs."""
        self._branches = {key: branch for key, branch in self._branches.items() if key[0] in but}

    @property
    def bytes_held(self) -> int:
        """Device memory of all branches."""
        return sum(branch.bytes_held for branch in self._branches.values())
