"""The draft's cache: what is in it and missing, proven, rid of what no run uses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dittocache.embeddings.config import CacheConfig
from dittocache.errors import CacheError, DittocacheError
from dittocache.events import EventLog
from dittocache.studio.state import Studio
from dittocache.studio.training import checked_config


@dataclass(frozen=True)
class Cause:
    """Records that are to be encoded for one reason.

    Attributes:
        words: the reason.
        stale: whether an earlier record is there that no longer fits.
        records: how many.
        samples: a few names.
    """

    words: str
    stale: bool
    records: int
    samples: tuple[str, ...]


@dataclass(frozen=True)
class CachePlan:
    """What a run needs of the cache.

    Attributes:
        made: when it was made, seconds since the epoch.
        hits, bytes_stored: records that are there.
        misses: records that are not.
        causes: of the misses.
        to_encode: encoder -> samples that it has to see.
        bytes_to_write: about; None where it cannot be told.
        seconds: encoder -> seconds it will take, about; None where that was never measured.
        text: the same as `dittocache cache plan` prints.
        problems: why there is no plan.
    """

    made: float
    samples: int = 0
    hits: int = 0
    misses: int = 0
    bytes_stored: int = 0
    bytes_to_write: int | None = None
    causes: tuple[Cause, ...] = ()
    to_encode: Mapping[str, int] | None = None
    seconds: Mapping[str, float | None] | None = None
    orphans: int = 0
    removed: int = 0
    text: str = ""
    problems: tuple[str, ...] = ()


def plan_cache(studio: Studio) -> CachePlan:
    """Plan the draft's caching; loads no model and changes nothing but what is remembered of files."""
    from dittocache.jobs.inputs import RunInputs

    try:
        config = checked_config(studio)
        plan = RunInputs(config, config.run_dir).plan()
    except DittocacheError as error:
        return CachePlan(time.time(), problems=error.problems or (str(error),))
    except OSError as error:
        return CachePlan(time.time(), problems=(str(error),))
    found: dict[str, Any] = plan.as_dict()
    return CachePlan(
        made=time.time(),
        samples=found["samples"],
        hits=plan.hits,
        misses=plan.misses,
        bytes_stored=plan.bytes_stored,
        bytes_to_write=found["bytes_to_write"],
        causes=tuple(Cause(one.cause, one.stale, one.records, tuple(one.samples)) for one in plan.missed.by_cause),
        to_encode={name: count for name, count in found["to_encode"].items() if count},
        seconds=found["seconds_to_encode"],
        orphans=plan.orphans,
        removed=len(plan.removed),
        text=plan.describe(),
    )


def cache_place(studio: Studio) -> Path | str:
    """Where the draft's cache is: a folder, or a URL; raises AccessError for a folder outside the allowed ones."""
    given = studio.draft.given.get("cache.cache_dir") or CacheConfig.model_fields["cache_dir"].default
    return str(given) if "://" in str(given) else studio.path(str(given))


def verify(studio: Studio, log: EventLog) -> str:
    """Prove every record of the cache, and say what was found."""
    from dittocache.embeddings.store.verification import verify_store

    return verify_store(_store(studio), log=log).describe()


def unused(studio: Studio) -> tuple[Any, str]:
    """What no run uses any more, for `remove_unused`, and in words; the second is empty where there is nothing."""
    from dittocache.embeddings.store.gc import plan_gc

    found = plan_gc(_store(studio))
    nothing = not (found.records or found.temporaries or found.quarantine or found.dead_roots)
    return found, "" if nothing else found.describe()


def remove_unused(studio: Studio, log: EventLog, plan: Any) -> str:
    """Remove what `unused` found, as far as no run has come to use it, and say what was removed."""
    from dittocache.embeddings.store.gc import collect

    return collect(_store(studio), plan, log=log).describe()


def _store(studio: Studio) -> Any:
    from dittocache.embeddings.store.store import Store

    place = cache_place(studio)
    if isinstance(place, Path) and not place.is_dir():
        raise CacheError(f"there is no cache {place} yet; encoding or training makes one")
    return Store(place)
