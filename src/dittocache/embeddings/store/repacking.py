"""Packs that are mostly dead are written again with what lives in them, or removed where nothing does."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dittocache.embeddings.store.loose import OpenRecord
from dittocache.embeddings.store.maintenance import Maintenance
from dittocache.embeddings.store.pack_file import PackDamagedError, Packed, read_places, write_pack
from dittocache.embeddings.store.packing import verified
from dittocache.embeddings.store.store import Store
from dittocache.errors import RecordCorruptError


class Repacked(Protocol):
    """What is counted."""

    packs_rewritten: int
    packs_removed: int
    corrupt: list[str]


def rewrite_packs(store: Store, held: Maintenance, dead_share: float, result: Repacked) -> None:
    """Write each pack again of whose bytes a larger share than `dead_share` is in no record of the index.

    The new pack and an index that names it are durable before the old one goes. Raises OSError.
    """
    packed = store.local.packed
    packed.refresh()
    for name in _wasteful(store, dead_share):
        held.touch()
        index = packed.snapshot.index
        rows = np.flatnonzero(index.number == list(index.packs).index(name))
        keys = index.select(rows).keys()
        living = [one for key in keys if (one := _read(store, key, name, result)) is not None]
        without = index.without_packs({name})
        if living:
            fresh, length, places = write_pack(packed.folder, living)
            packed.set_age(fresh, packed.path(name).stat().st_mtime_ns)
            packed.publish(without.with_packs({fresh: length}, places))
            result.packs_rewritten += 1
        else:
            packed.publish(without)
            result.packs_removed += 1
        packed.path(name).unlink(missing_ok=True)


def _wasteful(store: Store, dead_share: float) -> list[str]:
    """Packs with too many bytes that no record of the index has; packs whose file is gone."""
    index = store.local.packed.snapshot.index
    living = np.bincount(index.number, weights=index.length.astype(np.float64), minlength=len(index.packs))
    dropped = np.zeros(len(index.packs))
    names = list(index.packs)
    for key, pack in store.local.packed.snapshot.dropped:
        place = index.find(key)
        if place is not None and place.pack == pack:
            dropped[names.index(pack)] += place.length
    found = []
    for number, (name, length) in enumerate(index.packs.items()):
        used = living[number] - dropped[number]
        if used <= 0 or used < (1 - dead_share) * length and used < (1 - dead_share) * _record_bytes(store, name):
            found.append(name)
    return found


def _record_bytes(store: Store, name: str) -> int:
    """Bytes of all records of a pack, whether they are in the index or not; its own header is no waste."""
    try:
        places, _ = read_places(store.local.packed.path(name), name)
    except (FileNotFoundError, PackDamagedError):
        return 0
    return sum(place.length for _, place in places)


def _read(store: Store, key: str, pack: str, result: Repacked) -> Packed | None:
    packed = store.local.packed
    place = packed.find(key)
    if place is None or place.pack != pack:
        return None
    try:
        with packed.opened(key) as record:
            try:
                return verified(OpenRecord(record.descriptor, record.offset, record.length, pack), key)
            except RecordCorruptError:
                store.local.quarantine(key, record)
                result.corrupt.append(key)
    except FileNotFoundError:
        pass
    return None
