"""Encode what a plan misses: one encoder in memory at a time, every batch stored as soon as it is computed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dittocache.embeddings.encoding.result import EncodeResult
from dittocache.embeddings.encoding.session import EncoderSession, EncodeSettings
from dittocache.embeddings.encoding.stopping import HeldSignals
from dittocache.embeddings.planning.plan import Need, Plan
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, ModelError
from dittocache.events import EventLog
from dittocache.families.base import Family

__all__ = ["EncodeResult", "EncodeSettings", "EncoderSession", "encode_missing"]


def encode_missing(
    plan: Plan,
    encoders: Sequence[str | None],
    family: Family,
    model: str | Path,
    dtype: torch.dtype,
    device: str | torch.device,
    batch_size: int,
    store: Store,
    log: EventLog,
    *,
    num_workers: int = 0,
    skip_existing: bool = True,
) -> EncodeResult:
    """Compute and store the records of `encoders` that the plan misses.

    Args:
        plan: of the same family, model and dtype.
        encoders: components in the order in which they are loaded; None for the artifacts that need none.
        batch_size, num_workers, skip_existing: as in `EncodeSettings`.
        log: receives messages, and progress with samples a second, bytes and ETA for each encoder.

    A sample with a picture that cannot be read, or that changed since the plan, is left out, named in the result and
    reported at the end. SIGINT and SIGTERM take effect once what is in flight is stored. Raises StoreUnavailableError
    when a record cannot be written, CacheError when a single sample does not fit into memory, ModelError for an encoder
    that the family does not have.
    """
    if (str(model), dtype) != (plan.model, plan.dtype):
        raise CacheError(f"the plan was made for {plan.model} in {plan.dtype}; found {model} in {dtype}: plan again")
    unknown = [encoder for encoder in encoders if encoder is not None and encoder not in family.encoders]
    if unknown:
        raise ModelError(f"{family.name} has no encoder {unknown[0]!r}; it has {', '.join(family.encoders)}")
    started = time.monotonic()
    settings = EncodeSettings(batch_size, num_workers, skip_existing)
    work = {encoder: _work(plan, encoder, skip_existing) for encoder in encoders}
    result = EncodeResult(reused=plan.hits_of(encoders) if skip_existing else 0)
    if any(work.values()):
        store.sweep()
    with HeldSignals() as signals:
        for encoder, needs in work.items():
            if needs:
                with EncoderSession(plan, encoder, family, device, store, log, settings, signals=signals) as session:
                    result.add(session.encode(needs))
    for path, problem in result.failed.items():
        log.message(f"left out: {path}: {problem}", level="error")
    result.seconds = time.monotonic() - started
    return result


def _work(plan: Plan, encoder: str | None, skip_existing: bool) -> list[Need]:
    return plan.work(encoder) if skip_existing else list(plan.needs.get(encoder, ()))
