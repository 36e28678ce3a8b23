"""The memory plan of a run: how large its samples are, as far as that is known without an encoder."""

from __future__ import annotations

from collections.abc import Sequence

from dittocache.embeddings.planning.identity import model_folder
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.errors import RecordCorruptError, RecordMissingError
from dittocache.jobs.inputs import RunInputs, load_manifest
from dittocache.training.memory_plan import TEXT_TOKENS, BatchSize, MemoryPlan, plan_memory
from dittocache.training.sources import Bucket, Source

LOOKED_AT = 200  # samples, spread over the data set, whose sizes are looked at


def memory_plan(inputs: RunInputs, names: Sequence[str], source: Source) -> MemoryPlan:
    """What training will hold, by the largest of the samples looked at."""
    looked_at = names[:: max(1, len(names) // LOOKED_AT)]
    shapes = {name: source.bucket(name) for name in looked_at}
    largest = max(looked_at, key=lambda name: _tokens(shapes[name]), default="")
    size = BatchSize(shapes[largest], _text_tokens(inputs, largest))
    return plan_memory(model_folder(inputs.model), inputs.family, inputs.config.train, inputs.dtype, size)


def _text_tokens(inputs: RunInputs, name: str) -> int:
    """Text tokens of the sample, where they are in the cache."""
    if not inputs.config.cache.use_cache:
        return TEXT_TOKENS
    try:
        return len(CachedSamples(inputs.store, load_manifest(inputs)).artifact(name, "prompt_embeds"))
    except (RecordMissingError, RecordCorruptError):
        return TEXT_TOKENS


def _tokens(shapes: Bucket) -> int:
    return sum(frames * height * width for frames, height, width in shapes)
