"""What a training is of, as digests: the frozen model and the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import blake3

from dittocache.data.digests import ContentIndex, text_digest
from dittocache.embeddings.planning.identity import encoder_identity
from dittocache.embeddings.recipe import canonical_json
from dittocache.jobs.inputs import INDEX_NAME, RunInputs, load_manifest


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
    """Of the manifest's keys where training reads a cache, else of the samples' files and captions."""
    if inputs.config.cache.use_cache:
        manifest = load_manifest(inputs)
        return text_digest(canonical_json({name: dict(manifest.samples[name]) for name in names}))
    digest = blake3.blake3()
    for sample in inputs.samples:
        files = [index.digest(file) for file in (sample.target, *sample.controls)]
        digest.update(canonical_json([sample.name, sample.prompt, list(sample.size), files]).encode())
    return str(digest.hexdigest(length=16))
