"""Foreign caches into the store: everything that can be checked is checked, the rest is said.

A record is written under the key of the plan's recipe, so it counts as what the plan's encoder makes of these
inputs. What a foreign file does not tell (whose weights made it) is taken on trust, stands in the record's provenance,
and can be tried on a few samples with `check`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from dittocache.embeddings.foreign.comparing import compare_samples, refuse_disagreement
from dittocache.embeddings.foreign.findings import ImportResult, Refusal
from dittocache.embeddings.foreign.matching import Matcher
from dittocache.embeddings.foreign.musubi import MusubiCache
from dittocache.embeddings.foreign.qflux import QfluxCache
from dittocache.embeddings.foreign.source import ForeignCache
from dittocache.embeddings.planning.plan import Plan
from dittocache.embeddings.store.bulk import PackWriter
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, DataError, RecordMissingError, StoreUnavailableError
from dittocache.events import EventLog, Progress
from dittocache.families.base import Family
from dittocache.families.registry import get_family

Tool = Literal["qflux", "musubi"]


def import_qflux(
    folder: str | Path,
    plan: Plan,
    store: Store,
    log: EventLog,
    *,
    check: int = 0,
    dry_run: bool = False,
    family: Family | None = None,
    device: str | torch.device = "cpu",
) -> ImportResult:
    """Bring what a qflux run cached (the spec's layout) into the store, as far as the plan misses it.

    Args:
        folder: qflux's `cache_dir`.
        plan: of the data set, model and dtype that the cache is to serve.
        check: how many samples to encode with the plan's own encoders and to compare, before anything is written.
        dry_run: only look: everything is read and checked, nothing written.
        family: of the plan; by default the one that its manifest names.
        device: for the encoders of `check`.

    Files that do not fit are left out and listed with the reason. Raises CacheError where the folder is no such cache,
    or `check` finds tensors that the plan's encoders would not have made; StoreUnavailableError.
    """
    return _import(QfluxCache(Path(folder)), plan, store, log, check, dry_run, family, device)


def import_musubi(
    folder: str | Path,
    plan: Plan,
    store: Store,
    log: EventLog,
    *,
    check: int = 0,
    dry_run: bool = False,
    family: Family | None = None,
    device: str | torch.device = "cpu",
) -> ImportResult:
    """Bring what musubi-tuner cached into the store, as far as the plan misses it; as `import_qflux`.

    Args:
        folder: musubi-tuner's `cache_directory`.
    """
    cache = MusubiCache(Path(folder), plan.manifest.family, list(plan.manifest.samples))
    return _import(cache, plan, store, log, check, dry_run, family, device)


IMPORTS: dict[Tool, Callable[..., ImportResult]] = {"qflux": import_qflux, "musubi": import_musubi}


def plan_import(tool: Tool, folder: str | Path, plan: Plan, store: Store, log: EventLog) -> ImportResult:
    """What importing would do, and why not more: a dry run."""
    if tool not in IMPORTS:
        raise CacheError(f"caches of {tool!r} cannot be imported; those of {', '.join(IMPORTS)} can")
    return IMPORTS[tool](folder, plan, store, log, dry_run=True)


def _import(
    cache: ForeignCache,
    plan: Plan,
    store: Store,
    log: EventLog,
    check: int,
    dry_run: bool,
    family: Family | None,
    device: str | torch.device,
) -> ImportResult:
    started = time.monotonic()
    matcher = Matcher(cache, plan, store, family or get_family(plan.manifest.family))
    result = ImportResult(cache.tool, str(cache.folder), dry_run, already_stored=len(plan.stored))
    result.verified, result.unverified = cache.verified, cache.unverified
    if check:
        result.compared = compare_samples(matcher, plan, check, device, log)
        refuse_disagreement(cache.tool, result.compared)
    wanted = list(matcher.wanted())
    progress = Progress(log, len(wanted))
    refused: dict[str, Refusal] = {}
    done: set[str] = set()
    with ExitStack() as opened:
        # Packs where there is a folder for them: a foreign cache comes as a whole, and can be read again.
        target = opened.enter_context(PackWriter(store)) if store.is_local and not dry_run else store
        for one in wanted:
            progress.advance()
            if one.key in done:
                continue
            try:
                foreign = matcher.read(one, done)
            except StoreUnavailableError:
                raise
            except (CacheError, DataError) as error:
                absent = isinstance(error, RecordMissingError)
                refused.setdefault(one.key, Refusal(one.sample.name, one.artifact, str(error), absent))
                continue
            refused.pop(one.key, None)  # another sample that shares the record had it
            result.notes.update(foreign.notes)
            result.imported += 1
            result.bytes_imported += foreign.tensor.nbytes
            done.add(one.key)
            if not dry_run:
                target.write(one.key, foreign.tensor, plan.recipe(one.key), provenance=matcher.provenance(foreign))
    result.refused = list(refused.values())
    result.seconds = time.monotonic() - started
    _report(result, log)
    return result


def _report(result: ImportResult, log: EventLog) -> None:
    if result.imported and not result.dry_run:
        trusted = "; ".join(result.unverified)
        log.message(f"imported from {result.tool} WITHOUT VERIFYING: {trusted}", level="warning")
    for one in result.refused:
        if not one.absent:
            log.message(f"not imported: {one.sample}, {one.artifact}: {one.reason}", level="warning")
