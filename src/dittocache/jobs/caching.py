"""The two caching stages: pictures through the VAE, prompts through the text encoders, each encoder in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dittocache.embeddings.encoding.encode import EncodeResult, encode_missing
from dittocache.embeddings.planning.plan import Plan
from dittocache.errors import CacheError
from dittocache.events import EventLog
from dittocache.jobs.inputs import RunInputs, complete_part, latent_encoders, text_encoders


def cache_latents(inputs: RunInputs, log: EventLog) -> None:
    """Encode the missing latents and plain facts (`img_shapes`)."""
    _encode(inputs, inputs.plan(), latent_encoders(inputs.family), log)


def cache_text(inputs: RunInputs, log: EventLog) -> None:
    """Encode the missing prompt embeddings, then write the manifest of what can be trained on.

    Raises CacheError when no sample is complete.
    """
    plan = inputs.plan()
    _encode(inputs, plan, text_encoders(inputs.family), log)
    manifest = complete_part(plan.manifest, inputs.store)
    left_out = len(plan.manifest.samples) - len(manifest.samples)
    if not manifest.samples:
        raise CacheError(f"none of the {left_out} samples could be cached; the messages above name the files")
    if left_out:
        log.message(f"{left_out} of {len(plan.manifest.samples)} samples are left out of training", level="warning")
    manifest.save(inputs.manifest_path)


def _encode(inputs: RunInputs, plan: Plan, encoders: Sequence[str | None], log: EventLog) -> None:
    """Encode with each encoder on its own device and report the sum."""
    total = EncodeResult()
    for encoder in encoders:
        found = encode_missing(
            plan,
            [encoder],
            inputs.family,
            inputs.model,
            inputs.dtype,
            inputs.encoder_device(encoder),
            inputs.config.cache.batch_size_of(encoder),
            inputs.store,
            log,
        )
        total.encoded += found.encoded
        total.reused += found.reused
        total.bytes_written += found.bytes_written
        total.seconds += found.seconds
        total.failed |= found.failed
    fields: dict[str, Any] = total.as_dict()
    fields.pop("failed_samples")
    log.emit("result", **fields)
