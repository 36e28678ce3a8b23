"""Shards: the work of one encoder in blocks that every worker cuts in the same way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from blake3 import blake3

from dittocache.embeddings.planning.plan import Need

_SAMPLES = 32
_FEWEST_SHARDS = 16


@dataclass(frozen=True)
class Shard:
    """A block of work, claimed as a whole.

    Attributes:
        name: follows from the keys: equal wherever the same work is cut out.
        needs: of samples of one size; no key occurs in two shards, but for bases (see `make_shards`).
    """

    name: str
    needs: tuple[Need, ...]

    @property
    def keys(self) -> set[str]:
        """Of all records that come from this shard."""
        return {key for need in self.needs for key in need.keys.values()}


def make_shards(
    needs: Iterable[Need],
    batch_size: int,
    failed: Collection[str] = frozenset(),
    base_of: Callable[[str], str | None] | None = None,
) -> list[Shard]:
    """Cut all needs of one encoder, whether stored or not, so that workers who began at different times agree.

    Args:
        batch_size: shards are whole batches of this many samples, where there are enough samples.
        failed: names of samples to leave out; another sample that shares a record makes it instead.
        base_of: the record that a record shares rows with, which must be stored before it and so is in its shard too.

    Samples of equal size stand together, so that batches hold tensors of one shape. A record that several samples share
    belongs to the first of them.
    """
    owned: set[str] = set()
    by_size: dict[tuple[int, int], list[Need]] = {}
    for need in needs:
        if need.sample.name in failed:
            continue
        keys = {artifact: key for artifact, key in need.keys.items() if key not in owned}
        if base_of is not None:
            bases = {base_of(key) for key in keys.values()}
            keys |= {artifact: key for artifact, key in need.keys.items() if key in bases}
        if keys:
            owned.update(keys.values())
            by_size.setdefault(need.sample.size, []).append(Need(need.sample, keys))
    length = _shard_length(sum(map(len, by_size.values())), batch_size)
    return [
        _shard(block[start : start + length])
        for size, block in sorted(by_size.items())
        for start in range(0, len(block), length)
    ]


def _shard_length(samples: int, batch_size: int) -> int:
    """Samples in a shard: 32 of a large set, fewer of a small one that several workers shall share."""
    wanted = min(_SAMPLES, samples // _FEWEST_SHARDS)
    return max(1, round(wanted / batch_size)) * batch_size


def _shard(needs: Sequence[Need]) -> Shard:
    keys = "".join(key for need in needs for key in need.keys.values())
    return Shard(blake3(keys.encode()).hexdigest(length=8), tuple(needs))
