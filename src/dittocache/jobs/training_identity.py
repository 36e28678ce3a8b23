"""What a training is of, as digests: the frozen model and the data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import blake3

from dittocache.data.digests import ContentIndex, text_digest
from dittocache.embeddings.planning.identity import encoder_identity
from dittocache.embeddings.recipe import canonical_json
from dittocache.jobs.inputs import INDEX_NAME, RunInputs, load_manifest

FILES = frozenset({"target", "controls", "mask"})  # fields of a sample that count by their contents


def sample_repeats(inputs: RunInputs, names: Sequence[str]) -> dict[str, int]:
    """How often a sample of `names` comes in an epoch, for those that come more than once."""
    wanted = frozenset(names)
    return {one.name: one.repeats for one in inputs.samples if one.repeats > 1 and one.name in wanted}


def run_identity(inputs: RunInputs, names: Sequence[str], accelerator: Any) -> dict[str, str]:
    """Digests `model` and `data`; the first process computes them, and files that did not change are not read again."""
    from accelerate.utils import broadcast_object_list

    found: list[dict[str, str]] = [{}]
    if accelerator.is_main_process:
        index = ContentIndex((inputs.config.cache.folder or inputs.run_dir) / INDEX_NAME)
        found = [{"model": _model_digest(inputs, index), "data": _data_digest(inputs, names, index)}]
        index.save()
    broadcast_object_list(found)
    return found[0]


def _model_digest(inputs: RunInputs, index: ContentIndex) -> str:
    return text_digest(canonical_json(encoder_identity(inputs.model, "transformer", (), inputs.dtype, index)))


def _data_digest(inputs: RunInputs, names: Sequence[str], index: ContentIndex) -> str:
    """Of the manifest's keys where training reads a cache, else of what is encoded; repeats count with both."""
    repeated = sample_repeats(inputs, names)
    if inputs.config.cache.use_cache:
        manifest = load_manifest(inputs)
        content: dict[str, Any] = {name: dict(manifest.samples[name]) for name in names}
        return text_digest(canonical_json([content, repeated] if repeated else content))
    digest = blake3.blake3()
    for sample in inputs.samples:
        facts = {field.name: getattr(sample, field.name) for field in fields(sample) if field.name not in FILES}
        facts["files"] = [index.digest(file) for file in (sample.target, *sample.controls)]
        facts["mask"] = index.digest(sample.mask) if sample.mask is not None else None
        digest.update(canonical_json(facts).encode())
    return str(digest.hexdigest(length=16))
