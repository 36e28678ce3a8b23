"""The two caching stages: pictures through the VAE, prompts through the text encoders, each encoder in turn.

Every process that caches runs the same code: it plans, claims shards of the work and encodes them. One of them leads:
it starts the others on this machine, stays until all is stored, and writes the manifest.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dittocache.embeddings.config import CacheConfig
from dittocache.embeddings.encoding.leases import Leases
from dittocache.embeddings.encoding.result import EncodeResult
from dittocache.embeddings.encoding.session import EncoderSession, EncodeSettings
from dittocache.embeddings.encoding.shard_worker import ShardWorker, open_leases
from dittocache.embeddings.encoding.stopping import HeldSignals
from dittocache.embeddings.planning.plan import Plan
from dittocache.embeddings.store import roots
from dittocache.errors import CacheError
from dittocache.events import EventLog, Progress
from dittocache.jobs.cache_removal import note_cached
from dittocache.jobs.inputs import (
    RunInputs,
    complete_part,
    latent_encoders,
    records_of,
    save_manifest,
    text_encoders,
)
from dittocache.jobs.run_folder import WORKERS_NAME
from dittocache.jobs.worker_processes import WorkerProcesses


def cache_latents(inputs: RunInputs, log: EventLog) -> None:
    """Encode the missing latents and plain facts (`img_shapes`)."""
    _encode(inputs, _registered_plan(inputs), latent_encoders(inputs.family), log)


def cache_text(inputs: RunInputs, log: EventLog) -> None:
    """Encode the missing prompt embeddings, then write the manifest of what can be trained on.

    Raises CacheError when no sample is complete.
    """
    plan = _registered_plan(inputs)
    _encode(inputs, plan, text_encoders(inputs.family), log)
    if inputs.leads:
        inputs.wait_for_stage_beside()  # which makes the latents that the manifest names
        _save_manifest(inputs, plan, log)


def _save_manifest(inputs: RunInputs, plan: Plan, log: EventLog) -> None:
    manifest = complete_part(plan.manifest, inputs.store)
    left_out = len(plan.manifest.samples) - len(manifest.samples)
    if not manifest.samples:
        raise CacheError(f"none of the {left_out} samples could be cached; the messages above name the files")
    if left_out:
        log.message(f"{left_out} of {len(plan.manifest.samples)} samples are left out of training", level="warning")
    save_manifest(inputs, manifest, log)


def _registered_plan(inputs: RunInputs) -> Plan:
    """The plan, once the store knows that this run uses its records, so that nobody collects them as garbage."""
    plan = inputs.plan()
    if inputs.leads and inputs.store.is_local:
        roots.register(inputs.store, inputs.manifest_path, plan.manifest.keys)
        if len(inputs.store.sizes(plan.manifest.keys)) < plan.hits:  # some were collected just before
            return inputs.plan()
    return plan


def _encode(inputs: RunInputs, plan: Plan, encoders: Sequence[str | None], log: EventLog) -> None:
    """Encode with one encoder after the other, beside the other workers, and report the sum."""
    cache = inputs.config.cache
    started = time.monotonic()
    total = EncodeResult(reused=_reused(plan, encoders) if cache.skip_existing else 0)
    with ExitStack() as opened:
        others: WorkerProcesses | None = None
        leases = open_leases(inputs.store, cache.lease_seconds, log)
        if leases is not None:
            opened.enter_context(leases)
        if any(plan.work(encoder) for encoder in encoders) or not cache.skip_existing:
            if inputs.leads:
                note_cached(inputs, records_of(plan, encoders) - plan.stored.keys())
                _tidy(inputs, leases, log.stage)
            if inputs.worker == 0 and cache.workers > 1:
                others = WorkerProcesses(log.stage, inputs.config, inputs.run_dir, cache.workers - 1, log)
                opened.enter_context(others)
            _share_cores(cache.workers)
        signals = opened.enter_context(HeldSignals())
        for encoder in encoders:
            total.add(_encode_with(inputs, plan, encoder, leases, signals, log))
        for found in others.results() if others is not None else ():
            total.encoded += found["encoded"]
            total.samples += found["samples"]
            total.bytes_written += found["bytes_written"]
            total.failed |= found["failed"]
    if inputs.leads:
        for path, problem in total.failed.items():
            log.message(f"left out: {path}: {problem}", level="error")
    total.seconds = time.monotonic() - started
    fields: dict[str, Any] = total.as_dict()
    fields.pop("failed_samples")
    log.emit("result", **fields)


def _encode_with(
    inputs: RunInputs,
    plan: Plan,
    encoder: str | None,
    leases: Leases | None,
    signals: HeldSignals,
    log: EventLog,
) -> EncodeResult:
    """Claim and encode shards of one encoder; it is loaded when there is something to encode, and gone afterwards."""
    cache = inputs.config.cache
    settings = EncodeSettings(cache.batch_size_of(encoder), _decoders(cache), cache.skip_existing)
    with ExitStack() as opened:

        def open_session(progress: Progress) -> EncoderSession:
            device = inputs.encoder_device(encoder)
            session = EncoderSession(
                plan, encoder, inputs.family, device, inputs.store, log, settings, progress=progress, signals=signals
            )
            return opened.enter_context(session)

        worker = ShardWorker(
            plan,
            encoder,
            settings.batch_size,
            inputs.store,
            leases,
            open_session,
            log,
            signals=signals,
            waits=inputs.leads,
            again=None if cache.skip_existing else _marks(inputs, log.stage),
        )
        return worker.run()


def _tidy(inputs: RunInputs, leases: Leases | None, stage: str) -> None:
    """Remove what workers that died have left, and what an earlier run remembers of encoding everything again."""
    inputs.store.sweep()
    if leases is not None:
        leases.sweep()
    shutil.rmtree(_marks(inputs, stage), ignore_errors=True)


def _marks(inputs: RunInputs, stage: str) -> Path:
    """Where the workers of this run note which shards they have encoded again."""
    workers = inputs.run_dir / WORKERS_NAME if inputs.worker == 0 else inputs.run_dir.parent
    return workers / "again" / stage


def _decoders(cache: CacheConfig) -> int:
    """Processes that decode ahead for one of the workers, which share the cores."""
    return min(cache.num_workers, (os.cpu_count() or 1) // cache.workers)


def _reused(plan: Plan, encoders: Sequence[str | None]) -> int:
    return sum(key in plan.stored for key in records_of(plan, encoders))


def _share_cores(workers: int) -> None:
    """Let the workers on this machine take their part of the cores each, unless the user has said how many."""
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
