"""The memory plan of a run: how large its samples are, as far as that is known without an encoder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dittocache.data.pictures import picture_size
from dittocache.embeddings.planning.identity import model_folder
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.errors import RecordCorruptError, RecordMissingError
from dittocache.families.base import Family
from dittocache.families.estimates import size_estimator
from dittocache.jobs.inputs import RunInputs, load_manifest
from dittocache.training.fitting import CHOICES, Fit, fitting_choice
from dittocache.training.memory_plan import TEXT_TOKENS, BatchSize, MemoryPlan, gigabytes, plan_memory, plan_of
from dittocache.training.sources import Bucket, Source
from dittocache.training.transformer_facts import safetensors_sizes, transformer_facts

LOOKED_AT = 200  # samples, spread over the data set, whose sizes are looked at


def memory_plan(inputs: RunInputs, names: Sequence[str], source: Source) -> MemoryPlan:
    """What training will hold, by the largest of the samples looked at."""
    looked_at = names[:: max(1, len(names) // LOOKED_AT)]
    shapes = {name: source.bucket(name) for name in looked_at}
    largest = max(looked_at, key=lambda name: _tokens(shapes[name]), default="")
    size = BatchSize(shapes[largest], _text_tokens(inputs, largest))
    plan = plan_memory(model_folder(inputs.model), inputs.family, inputs.config.train, inputs.dtype, size)
    return replace(plan, encoders=live_encoder_bytes(inputs))


def forecast_memory(inputs: RunInputs) -> MemoryPlan:
    """The same before anything is cached: sizes from the pictures' headers and the prompts' words."""
    folder, config = model_folder(inputs.model), inputs.config.train
    plan = plan_memory(folder, inputs.family, config, inputs.dtype, sample_size(inputs))
    return replace(plan, encoders=live_encoder_bytes(inputs))


def fit_to_memory(inputs: RunInputs, device_bytes: int, machine_bytes: int) -> Fit:
    """Which way of holding the frozen weights this run should take with so much free memory; nothing is loaded."""
    folder, config = model_folder(inputs.model), inputs.config.train
    facts = transformer_facts(folder, inputs.family, config, inputs.dtype, sample_size(inputs))
    plans = [(choice, plan_of(facts, config.model_copy(update=dict(choice)))) for choice in CHOICES]
    return fitting_choice(device_bytes - live_encoder_bytes(inputs), machine_bytes, plans)


def memory_warning(plan: MemoryPlan, device: torch.device) -> str | None:
    """What to tell a user whose device has less free than the plan says; None where it is enough or not known."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = free_machine_bytes()
    else:
        return None
    if plan.device_total <= free:
        return None
    return (
        f"only {gigabytes(free)} are free on {device}, so memory will run out: lower train.batch_size or "
        "data.resolution, or set train.gradient_checkpointing, train.base_quantization or train.offload"
    )


def free_machine_bytes() -> int:
    """Free memory of this machine, what the system only keeps files in included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all that the machine has
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sample_size(inputs: RunInputs) -> BatchSize:
    """The largest of the samples looked at, from its pictures' headers and its prompt's words."""
    looked_at = inputs.samples[:: max(1, len(inputs.samples) // LOOKED_AT)]
    encoded = inputs.family.encode(None, None, looked_at, inputs.sizes)
    shapes = [tuple(tuple(row) for row in tensors["img_shapes"].tolist()) for tensors in encoded]
    sample, largest = max(zip(looked_at, shapes, strict=True), key=lambda pair: _tokens(pair[1]))
    estimator = size_estimator(inputs.family.name, model_folder(inputs.model))
    if estimator is None:
        return BatchSize(largest)
    return BatchSize(largest, estimator.text_sizes(sample, inputs.sizes, picture_size)["prompt_embeds"].rows)


def live_encoder_bytes(inputs: RunInputs) -> int:
    """Bytes of the encoders that training holds beside the transformer: none where all is cached or is elsewhere."""
    if inputs.config.cache.use_cache:
        return 0
    elsewhere = {
        str(name) for name, device in inputs.config.cache.devices.items() if device not in (inputs.device, "auto")
    }
    sizes = encoder_bytes(model_folder(inputs.model), inputs.family, inputs.dtype)
    return sum(size for name, size in sizes.items() if name not in elsewhere)


def encoder_bytes(folder: Path, family: Family, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each encoder's weights in `dtype`, from the headers of the checkpoint's files."""
    return {name: sum(safetensors_sizes(folder / name).values()) * dtype.itemsize for name in family.encoders}


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
