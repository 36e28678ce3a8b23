"""Caches of other tools for a run, and a run's cache for other tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from dittocache.config import RunConfig
from dittocache.embeddings.foreign import export, importing
from dittocache.embeddings.foreign.export import ExportResult
from dittocache.embeddings.foreign.findings import ImportResult
from dittocache.embeddings.store import roots
from dittocache.events import Event, EventLog
from dittocache.jobs.inputs import RunInputs, load_manifest
from dittocache.jobs.run_folder import EVENTS_NAME, held_folder

Listener = Callable[[Event], None]


def import_cache(
    config: RunConfig,
    tool: Literal["qflux", "musubi"],
    folder: Path,
    listener: Listener,
    *,
    check: int = 0,
    dry_run: bool = False,
) -> ImportResult:
    """Import what fits the run's data set and model; raises CacheError, DataError, ModelError or StageError."""
    inputs = RunInputs(config, config.run_dir)
    with held_folder(config.run_dir):
        log = EventLog(config.run_dir / EVENTS_NAME, "import", listener)
        plan = inputs.plan()
        if inputs.store.is_local and not dry_run:  # so that nobody collects it as garbage before it is trained on
            roots.register(inputs.store, inputs.manifest_path, plan.manifest.keys)
        bring = importing.IMPORTS[tool]
        return bring(
            folder,
            plan,
            inputs.store,
            log,
            check=check,
            dry_run=dry_run,
            family=inputs.family,
            device=inputs.device,
        )


def export_cache(
    config: RunConfig,
    folder: Path,
    listener: Listener,
    format: Literal["pt", "safetensors"],
    layout: Literal["qflux", "flat"],
    *,
    dry_run: bool = False,
) -> ExportResult:
    """Export what the run's manifest names; raises CacheError when nothing was cached, and as the export does."""
    inputs = RunInputs(config, config.run_dir)
    manifest = load_manifest(inputs)
    samples = inputs.samples if layout == "qflux" else None
    if dry_run:
        return export.plan_export(inputs.store, manifest, folder, format, layout, samples)
    log = EventLog(config.run_dir / EVENTS_NAME, "export", listener)
    return export.export_cache(inputs.store, manifest, folder, format, layout, samples, log=log)
