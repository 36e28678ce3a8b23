"""Garbage collection: remove records that no living root names, beside runs that may start at any moment.

First the plan: what would go, and how much. Then, holding the store's maintenance, records are *marked*: loose ones
move to the trash, packed ones leave the index. Then the roots are read once more: what became live meanwhile comes
back. Only then is anything removed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dittocache.embeddings.store.gc_report import GcPlan, GcResult
from dittocache.embeddings.store.local import LocalRecords
from dittocache.embeddings.store.loose import SUFFIX
from dittocache.embeddings.store.maintenance import Maintenance, maintenance, put_back, to_trash
from dittocache.embeddings.store.packing import adopt_packs
from dittocache.embeddings.store.repacking import rewrite_packs
from dittocache.embeddings.store.roots import Root, forget, roots
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import CacheError
from dittocache.events import EventLog, Progress

MIN_AGE_SECONDS = 3600.0
DEAD_SHARE = 0.25  # of a pack's bytes; above, the pack is written again without them
KeyArray = npt.NDArray[np.bytes_]


def plan_gc(store: Store, *, min_age_seconds: float = MIN_AGE_SECONDS) -> GcPlan:
    """Find what no living root names; nothing is changed.

    Raises CacheError when a root cannot be read, for what it named cannot be known then.
    """
    with unavailable(f"the store {store.root} cannot be read"):
        found = roots(store)
        dead_roots = [root for root in found if root.is_dead(min_age_seconds)]
        living_roots = [root for root in found if root not in dead_roots]
        live = _union(living_roots)
        before = time.time_ns() - int(min_age_seconds * 1e9)
        loose = _sort(((file.key, file.length, file.modified) for file in store.local.loose.files()), live, before)
        packed = _sort(_packed_ages(store.local), live, before)
        return GcPlan(
            loose=loose.unused,
            packed=packed.unused,
            by_artifact=_by_artifact(store, {**loose.unused, **packed.unused}),
            too_young=loose.too_young + packed.too_young,
            kept=(loose.kept + packed.kept, loose.kept_bytes + packed.kept_bytes),
            temporaries=_lengths(store.local.temporaries()),
            quarantine=_lengths(
                path for path in (store.root / "quarantine").glob(f"*{SUFFIX}") if path.stat().st_mtime_ns < before
            ),
            dead_roots=dead_roots,
            living_roots=living_roots,
            min_age_seconds=min_age_seconds,
        )


def collect(store: Store, gc_plan: GcPlan, *, log: EventLog | None = None) -> GcResult:
    """Remove what the plan names, as far as no root names it by now.

    Args:
        log: receives progress in records.

    May be stopped at any moment, and may go on beside readers and caching runs. Raises CacheError while another process
    packs or removes records, and StoreUnavailableError when the folder cannot be written.
    """
    result = GcResult()
    with unavailable(f"unused records of {store.root} cannot be removed"), maintenance(store.local) as held:
        adopt_packs(store.local)
        before = time.time_ns() - int(gc_plan.min_age_seconds * 1e9)
        _remove(store, held, gc_plan.loose, gc_plan.packed, before, gc_plan.dead_roots, result, log)
        for path in (*gc_plan.temporaries, *gc_plan.quarantine):
            path.unlink(missing_ok=True)
            result.files_removed += 1
        _forget_dropped(store.local)
        result.roots_forgotten = _forget(store, gc_plan.dead_roots)
    return result


def remove_unshared(store: Store, manifest_keys: Collection[str], own_root: Root | None) -> GcResult:
    """Remove those of a run's records that no other root names, and the run's own root.

    Args:
        manifest_keys: the records that the run cached.
        own_root: as `roots.register` returned it.
    """
    result = GcResult()
    with unavailable(f"records of {store.root} cannot be removed"), maintenance(store.local) as held:
        adopt_packs(store.local)
        own = [] if own_root is None else [own_root]
        packed = store.local.packed.sizes(list(manifest_keys))
        loose = store.local.loose.sizes([key for key in manifest_keys if key not in packed])
        _remove(store, held, loose, packed, time.time_ns(), own, result, None)
        result.roots_forgotten = _forget(store, own)
    return result


def _remove(
    store: Store,
    held: Maintenance,
    loose: dict[str, int],
    packed: dict[str, int],
    before: int,
    ignored: Iterable[Root],
    result: GcResult,
    log: EventLog | None,
) -> None:
    """Mark, look at the roots once more, bring back, remove; `before`: loose records changed later than this stay."""
    records = store.local
    progress = None if log is None else Progress(log, len(loose) + len(packed))
    trashed: dict[str, Path] = {}
    for key in loose:
        with suppress(FileNotFoundError):
            if records.loose.path(key).stat().st_mtime_ns < before and (path := to_trash(records, key)) is not None:
                trashed[key] = path
    index = records.packed.snapshot.index
    rows = index.rows(list(packed))
    marked = {key: int(row) for key, row in zip(packed, rows.tolist(), strict=True) if row >= 0}
    if marked:
        records.packed.publish(index.without_rows(np.array(list(marked.values()), dtype=np.intp)))

    try:
        unchanged = {(root.id, root.registered) for root in ignored}
        live = _union(root for root in roots(store) if (root.id, root.registered) not in unchanged)
    except BaseException:  # the trash comes back by itself
        if marked:
            records.packed.publish(index)
        raise
    for key in _chosen(trashed, live):
        put_back(records, trashed.pop(key))
        result.brought_back += 1
    if back := _chosen(marked, live):
        for key in back:
            del marked[key]
        records.packed.publish(index.without_rows(np.array(list(marked.values()), dtype=np.intp)))
        result.brought_back += len(back)

    for key, path in trashed.items():
        path.unlink(missing_ok=True)
        result.records += 1
        result.bytes_removed += loose[key]
        if progress is not None:
            progress.advance()
    result.records += len(marked)
    result.bytes_removed += sum(packed[key] for key in marked)
    if progress is not None:
        progress.advance(len(marked))
    rewrite_packs(store, held, DEAD_SHARE, result)


def _forget(store: Store, dead: Iterable[Root]) -> int:
    """Remove roots that nobody has registered again meanwhile; returns how many."""
    unchanged = {(root.id, root.registered) for root in dead}
    gone = [root for root in roots(store) if (root.id, root.registered) in unchanged]
    for root in gone:
        forget(store, root.id)
    return len(gone)


@dataclass
class _Sorted:
    unused: dict[str, int] = field(default_factory=dict)
    too_young: int = 0
    kept: int = 0
    kept_bytes: int = 0


def _sort(found: Iterable[tuple[str, int, int]], live: KeyArray, before: int) -> _Sorted:
    """Which of these (key, bytes, written) are used, are unused since `before`, or too young to tell."""
    listed = list(found)
    result = _Sorted()
    alive = _is_in([key for key, _, _ in listed], live).tolist()
    for (key, length, written), is_alive in zip(listed, alive, strict=True):
        if is_alive:
            result.kept += 1
            result.kept_bytes += length
        elif written < before:
            result.unused[key] = length
        else:
            result.too_young += 1
    return result


def _packed_ages(records: LocalRecords) -> Iterator[tuple[str, int, int]]:
    """Every packed record: key, bytes, and when the youngest record of its pack was written, in nanoseconds."""
    records.packed.refresh()
    index = records.packed.snapshot.index
    written = []
    for name in index.packs:
        try:
            written.append(records.packed.path(name).stat().st_mtime_ns)
        except FileNotFoundError:
            written.append(0)
    for key, length, number in zip(index.keys(), index.length.tolist(), index.number.tolist(), strict=True):
        yield key, length, written[number]


def _union(living: Iterable[Root]) -> KeyArray:
    keys = [np.frombuffer(root.keys, dtype="S16") for root in living]
    return np.unique(np.concatenate(keys)) if keys else np.empty(0, dtype="S16")


def _is_in(keys: Sequence[str], live: KeyArray) -> npt.NDArray[np.bool_]:
    return np.isin(np.frombuffer(bytes.fromhex("".join(keys)), dtype="S16"), live)


def _chosen(keys: Collection[str], live: KeyArray) -> list[str]:
    listed = list(keys)
    return [key for key, alive in zip(listed, _is_in(listed, live).tolist(), strict=True) if alive]


def _by_artifact(store: Store, lengths: dict[str, int]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for key, length in lengths.items():
        try:
            name = store.header(key).name
        except CacheError:
            name = "unreadable"
        count, total = found.get(name, (0, 0))
        found[name] = (count + 1, total + length)
    return found


def _lengths(paths: Iterable[Path]) -> dict[Path, int]:
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):
            found[path] = path.stat().st_size
    return found


def _forget_dropped(records: LocalRecords) -> None:
    """Entries of packs that are gone need not be kept out any more."""
    for key, pack in records.packed.snapshot.dropped:
        if not records.packed.path(pack).exists():
            (records.packed.dropped_folder / f"{key}.{pack}").unlink(missing_ok=True)
