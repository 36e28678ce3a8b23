"""The two caching stages: pictures through the VAE, prompts through the text encoders, each encoder in turn.

Every process that caches runs the same code: it plans, claims shards of the work and encodes them. One of them leads:
it starts the others on this machine, stays until all is stored, and writes the manifest.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dittocache.config import check_config
from dittocache.embeddings.config import CacheConfig
from dittocache.embeddings.encoding.leases import Leases
from dittocache.embeddings.encoding.ray_actors import RayActors
from dittocache.embeddings.encoding.result import EncodeResult
from dittocache.embeddings.encoding.session import EncoderSession, EncodeSettings
from dittocache.embeddings.encoding.shard_worker import ShardWorker, open_leases
from dittocache.embeddings.encoding.stopping import HeldSignals
from dittocache.embeddings.planning.plan import Plan
from dittocache.embeddings.store import roots
from dittocache.errors import CacheError, ConfigError
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
from dittocache.jobs.run_folder import EVENTS_NAME, WORKERS_NAME
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


def _encode(inputs: RunInputs, plan: Plan, encoders: Sequence[str | None], log: EventLog) -> dict[str, Any]:
    """Encode with one encoder after the other, beside the other workers, and report the sum."""
    cache = inputs.config.cache
    skips_existing = cache.skips_existing(encoders[0])
    if not skips_existing and inputs.rank.count > 1:
        raise ConfigError(
            f"cache.skip_existing is false in a group of {inputs.rank.count} processes, each of which would encode "
            "everything again; start one process, with cache.workers for more on this machine"
        )
    started = time.monotonic()
    total = EncodeResult(reused=plan.hits_of(encoders) if skips_existing else 0)
    with ExitStack() as opened:
        others: WorkerProcesses | None = None
        leases = open_leases(inputs.store, cache.lease_seconds, log)
        if leases is not None:
            opened.enter_context(leases)
        if any(plan.work(encoder) for encoder in encoders) or not skips_existing:
            if inputs.leads:
                if not cache.keeps(encoders[0]):
                    note_cached(inputs, records_of(plan, encoders) - plan.stored.keys())
                _tidy(inputs, leases, log.stage)
            if inputs.leads and cache.runner == "ray":
                _encode_on_ray(inputs, plan, encoders, log, total)
            elif inputs.worker == 0 and cache.workers > 1:
                others = WorkerProcesses(log.stage, inputs.config, inputs.run_dir, cache.workers - 1, log)
                opened.enter_context(others)
            _share_cores(cache.workers)
        with HeldSignals() as signals:
            for encoder in encoders:
                total.add(_encode_with(inputs, plan, encoder, leases, signals, log))
        for found in others.results() if others is not None else ():
            _add(total, found)
    if inputs.leads:
        for path, problem in total.failed.items():
            log.message(f"left out: {path}: {problem}", level="error")
    total.seconds = time.monotonic() - started
    fields: dict[str, Any] = total.as_dict()
    fields.pop("failed_samples")
    log.emit("result", **fields)
    return fields


def encode_beside(stage: str, settings: dict[str, Any], run_dir: str, worker: int) -> dict[str, Any]:
    """What a Ray actor does for a caching stage: claim and encode what is free, and return the result's fields.

    Args:
        settings: of the run, as JSON values, with absolute paths.
        worker: the actor's number, from 1 on.
    """
    folder = Path(run_dir) / WORKERS_NAME / str(worker)
    inputs = RunInputs(check_config(settings), folder, worker)
    encoders = latent_encoders(inputs.family) if stage == "cache_latents" else text_encoders(inputs.family)
    return _encode(inputs, inputs.plan(), encoders, EventLog(folder / EVENTS_NAME, stage))


def _encode_on_ray(
    inputs: RunInputs, plan: Plan, encoders: Sequence[str | None], log: EventLog, total: EncodeResult
) -> None:
    """Let Ray actors encode; what they leave undone, because they failed, is left to this process."""
    missing = records_of(plan, encoders) - plan.stored.keys()
    progress = Progress(log, len(missing))

    def count_stored() -> None:
        progress.advance(len(inputs.store.sizes(missing)) - progress.done)

    settings = settings_for_ray(inputs)
    work = partial(encode_beside, log.stage, settings, str(inputs.run_dir.absolute()))
    gpus = int(any(inputs.encoder_device(encoder).startswith("cuda") for encoder in encoders if encoder is not None))
    with RayActors(work, inputs.config.cache.workers, gpus) as actors:
        for number, found in enumerate(actors.results(count_stored), start=1):
            if isinstance(found, str):
                log.message(f"Ray actor {number} failed: {found}; others do its work", level="warning")
            else:
                _add(total, found)


def settings_for_ray(inputs: RunInputs) -> dict[str, Any]:
    """The run's settings for a process in another folder, perhaps on another machine, that sees its own GPU only."""
    settings = inputs.config.model_dump(mode="json")
    settings["data"] = inputs.config.data.absolute().model_dump(mode="json")
    if inputs.config.cache.folder is not None:
        settings["cache"]["cache_dir"] = str(inputs.config.cache.folder.absolute())
    if Path(inputs.model).exists():
        settings["model"]["path"] = str(Path(inputs.model).absolute())
    for section, name in [
        (settings["model"], "device"),
        *((settings["cache"]["devices"], name) for name in inputs.config.cache.devices),
    ]:
        section[name] = "cuda" if section[name].startswith("cuda") else section[name]
    return settings


def _add(total: EncodeResult, found: Mapping[str, Any]) -> None:
    """Count what another worker of this run did, from the fields of its result."""
    total.encoded += found["encoded"]
    total.samples += found["samples"]
    total.bytes_written += found["bytes_written"]
    total.failed |= found["failed"]


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
    skips_existing = cache.skips_existing(encoder)
    settings = EncodeSettings(cache.batch_size_of(encoder), _decoders(cache, encoder), skips_existing)
    with ExitStack() as opened:

        def open_session(progress: Progress) -> EncoderSession:
            device = inputs.encoder_device(encoder)
            session = EncoderSession(
                plan,
                encoder,
                inputs.encoding_family,
                device,
                inputs.store,
                log,
                settings,
                progress=progress,
                signals=signals,
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
            again=None if skips_existing else _marks(inputs, log.stage),
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


def _decoders(cache: CacheConfig, encoder: str | None) -> int:
    """Processes that decode ahead for one of the workers, which share the cores."""
    return min(cache.num_workers_of(encoder), (os.cpu_count() or 1) // cache.workers)


def _share_cores(workers: int) -> None:
    """Let the workers on this machine take their part of the cores each, unless the user has said how many."""
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
