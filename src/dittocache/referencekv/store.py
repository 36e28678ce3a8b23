"""Keys and values of reference tokens: one slot a block, one set of slots a CFG branch, one run at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.identity import ReferenceIdentity
from dittocache.referencekv.memory import Placement, ReferenceSize, choose, gb
from dittocache.referencekv.offload import DeviceBlocks, OffloadedBlocks, Tensors, link_to
from dittocache.referencekv.storage import NATIVE, KeyValue, ReferenceSource

logger = logging.getLogger(__name__)

Decide = Callable[["BranchKV", torch.Tensor, ReferenceSource | None], Placement]
AS_COMPUTED = Placement(NATIVE, offload=False)


class BranchKV:
    """What one CFG branch keeps: K after norm and RoPE, and V, of the R reference tokens, `(B, R, H, d)` a block.

    Args:
        decide: takes itself, K `(B, R, H, d)` of the first block, and what it comes from; says how they are kept.
            Is asked whenever they are computed anew. As computed when left out.
    """

    def __init__(self, decide: Decide | None = None) -> None:
        self._decide = decide
        self._restore: dict[int, Callable[[Tensors], KeyValue]] = {}
        self._kept: DeviceBlocks | OffloadedBlocks = DeviceBlocks()
        self._frequencies: tuple[torch.Tensor, ...] | None = None
        self.placement = AS_COMPUTED
        self.like: torch.Tensor | None = None
        """Of the dtype and device of K in the first block, and empty; None before it was put."""
        self.size: ReferenceSize | None = None
        """None before the first was put."""
        self.reused: int | None = None
        """Computed steps since the slots were filled; None while they are not all filled."""

    @property
    def holds_any(self) -> bool:
        """Whether any slot is filled."""
        return bool(self._restore)

    @property
    def bytes_held(self) -> int:
        """Memory on the device, at most."""
        return self._kept.device_bytes

    @property
    def host_bytes_held(self) -> int:
        """Memory on the host."""
        return self._kept.host_bytes

    def begin_filling(self) -> None:
        """Empty the slots: until `filled()` they hold nothing that may be read."""
        self._restore, self._frequencies, self.reused = {}, None, None
        self._kept.empty()

    def put(self, block: int, key: torch.Tensor, value: torch.Tensor, source: ReferenceSource | None = None) -> None:
        """Keep copies: a slice would keep the keys of all tokens alive.

        Args:
            source: what they are computed from, where that may be kept in their stead.
        """
        if not self._restore:
            self.like = key.new_empty(0)
            self._settle(AS_COMPUTED if self._decide is None else self._decide(self, key, source))
        self._keep(block, key.detach(), value.detach(), source)

    def filled(self) -> None:
        """Every block has put its keys and values."""
        self.reused = 0

    def take(self, block: int) -> KeyValue:
        """Keys and values of one block; RuntimeError where the block never ran, which only a broken forward can do."""
        restore = self._restore.get(block)
        if restore is None:
            raise RuntimeError(f"block {block} has no reference keys and values, although the step before was full")
        return restore(self._kept.take(block))

    def move(self, placement: Placement) -> None:
        """Keep what is here in another way."""
        if placement == self.placement or not self._restore:
            return
        before, restore = self._kept, self._restore
        self._restore = {}
        for block in restore:
            key, value = restore[block](before.take(block))
            self._settle(placement)
            self._keep(block, key, value, None)
            if before is not self._kept:
                before.drop(block)

    def _settle(self, placement: Placement) -> None:
        if placement.offload != isinstance(self._kept, OffloadedBlocks):
            self._kept = OffloadedBlocks(link_to) if placement.offload else DeviceBlocks()
        self.placement = placement

    def _keep(self, block: int, key: torch.Tensor, value: torch.Tensor, source: ReferenceSource | None) -> None:
        if source is not None and not self.placement.form.from_key_value:
            if self._frequencies is None:  # all blocks have the same
                self._frequencies = tuple(one.detach().clone() for one in source.frequencies)
            source = replace(source, modulated=source.modulated.detach(), frequencies=self._frequencies)
        packed = self.placement.form.pack(key, value, source)
        self._restore[block] = packed.restore
        copied = packed.fresh or self.placement.offload
        self._kept.put(block, packed.tensors if copied else tuple(_copy(tensor) for tensor in packed.tensors))


class RunKV:
    """All branches of the runs that are under way, kept so that together they fit a budget.

    Args:
        blocks: of the transformer.
        config: storage, offloading and budget.
        exact: whether references are exact, and are to stay so.
        say: takes a remark for the user.
    """

    def __init__(
        self,
        blocks: int,
        config: ReferenceKVConfig | None = None,
        exact: bool = False,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self._blocks = blocks
        self._config = config or ReferenceKVConfig()
        self._exact = exact
        self._say = say
        self._said: set[Placement] = set()
        self._branches: dict[tuple[int, str], BranchKV] = {}
        self._shared: list[tuple[ReferenceIdentity, BranchKV]] = []
        self.predicted_bytes = 0
        """Most memory on the device that references were expected to take, when they were about to be kept."""

    def branch(self, run: int, name: str) -> BranchKV:
        """The branch of this run and name, empty at first."""
        return self._branches.setdefault((run, name), BranchKV(self._decide))

    def shared(self, run: int, name: str, identity: ReferenceIdentity) -> BranchKV:
        """The same for references that depend on nothing but `identity`: one for all branches that have it.

        What no run under way uses is freed before another one is begun.
        """
        found = next((branch for known, branch in self._shared if known.matches(identity)), None)
        if found is None:
            found = BranchKV(self._decide)
            used = self._branches.values()
            self._shared = [(known, branch) for known, branch in self._shared if branch in used]
            self._shared.append((identity.kept(), found))
        self._branches[run, name] = found
        return found

    def clear(self, but: Collection[int] = (), shared_too: bool = True) -> None:
        """Free everything, or all but what belongs to some runs; `shared_too` False keeps what was shared."""
        self._branches = {key: branch for key, branch in self._branches.items() if key[0] in but}
        if shared_too:
            used = self._branches.values()
            self._shared = [(known, branch) for known, branch in self._shared if branch in used]

    @property
    def bytes_held(self) -> int:
        """Device memory of all branches."""
        return sum(branch.bytes_held for branch in self._sets)

    @property
    def host_bytes_held(self) -> int:
        """Memory on the host of all branches."""
        return sum(branch.host_bytes_held for branch in self._sets)

    @property
    def _sets(self) -> list[BranchKV]:
        return list(dict.fromkeys([*self._branches.values(), *(branch for _, branch in self._shared)]))

    def _decide(self, asking: BranchKV, key: torch.Tensor, source: ReferenceSource | None) -> Placement:
        """How `asking` keeps K like `key`; what is kept already follows suit."""
        size = asking.size = ReferenceSize(
            tokens=key.shape[1],
            batch=key.shape[0],
            layers=self._blocks - (self._config.freeze_from_layer or 0),
            heads=key.shape[2],
            head_width=key.shape[3],
            width=key.shape[2] * key.shape[3] if source is None else source.modulated.shape[2],
            element_size=key.element_size(),
        )
        sizes = [branch.size or size for branch in self._sets]  # one that is filled later will be like this one
        others = [branch for branch in self._sets if branch is not asking and branch.holds_any]
        placement = choose(
            self._config,
            sizes,
            exact=self._exact,
            on_host=key.device.type != "cpu",
            current=others[0].placement if others else None,
        )
        for branch in others:
            branch.move(placement)
        self.predicted_bytes = max(self.predicted_bytes, placement.device_bytes(sizes))
        self._remark(placement, sizes)
        return placement

    def _remark(self, placement: Placement, sizes: Sequence[ReferenceSize]) -> None:
        if self._config.max_gb is None or placement in self._said:
            return
        self._said.add(placement)
        remark = f"references are kept as {placement.words}: {gb(placement.device_bytes(sizes))} on the device"
        if placement.offload:
            remark += f", {gb(placement.host_bytes(sizes))} on the host"
        if placement != AS_COMPUTED:
            remark += f"; as computed they would take {gb(AS_COMPUTED.device_bytes(sizes))}"
        self._say(f"{remark} (max_gb {self._config.max_gb:g})")


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Laid out the same whatever it was cut from: compiled blocks make a graph for each layout."""
    return tensor.clone(memory_format=torch.contiguous_format)
