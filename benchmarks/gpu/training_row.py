"""One row of the training benchmark: load what the way needs, train some steps, say what it took.

Memory that runs out is a finding: the row then says where.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from benchmarks.gpu.workplace import Workplace, ran_out_of_memory, synchronize
from benchmarks.training import shared_out

from dittocache.embeddings.encoding.encode import encode_missing
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.planning.plan import Plan
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.embeddings.store.store import Store
from dittocache.events import EventLog
from dittocache.jobs.lora_training import peak_bytes
from dittocache.training.accelerator import make_accelerator
from dittocache.training.config import TrainConfig
from dittocache.training.frozen_base import load_frozen
from dittocache.training.loop import TrainState, train_lora
from dittocache.training.lora import add_lora
from dittocache.training.memory_plan import BatchSize, plan_memory
from dittocache.training.sources import CachedSource, LiveSource, MixedSource, Source

MANIFEST = "manifest.json"
WARM_UP_STEPS = 2
SHARE = 0.5  # of the samples, in the cache when the way is mixed
COMPARED_SAMPLES = 2


@dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
        way: `cached`, `mixed` or `live`.
        batch: samples a step.
        base: how the frozen weights are held, `none` (16 bit) or `fp8`.
        checkpointing: whether activations are computed again.
        offload: whether frozen blocks stay in the machine's memory.
        deterministic: whether torch is told to use deterministic kernels: for losses to be compared, not for times.
        steps: optimizer steps, the first two of which are not timed.
    """

    way: str
    batch: int = 1
    base: str = "none"
    checkpointing: bool = True
    offload: bool = False
    deterministic: bool = False
    steps: int = 8

    @property
    def setting(self) -> tuple[Any, ...]:
        """What rows have in common whose losses must be the same."""
        return self.batch, self.base, self.checkpointing, self.offload, self.deterministic, self.steps

    def __str__(self) -> str:
        words = [self.way, f"batch {self.batch}", "fp8 base" if self.base == "fp8" else "16-bit base"]
        words += [] if self.checkpointing else ["no checkpointing"]
        words += ["offloaded"] if self.offload else []
        return ", ".join([*words, *(["deterministic"] if self.deterministic else [])])


def cache_samples(place: Workplace, device: str) -> dict[str, Any]:
    """Encode all samples and save the manifest; seconds (without building the random weights), records, peak memory."""
    _encode(replace(place, samples_made=1), Store(place.folder / "warm-up"), device)  # chooses kernels, allocates
    plan, encoders = _encode(place, place.store, device)
    plan.manifest.save(place.folder / MANIFEST)
    for encoder, found in encoders.items():
        print(f"  {encoder}: {found['seconds']:.2f} s for {found['records']} records", file=sys.stderr, flush=True)
    return {
        "samples": len(plan.manifest.samples),
        "seconds": sum(one["seconds"] for one in encoders.values()),
        "bytes": sum(one["bytes"] for one in encoders.values()),
        "peak_bytes": peak_bytes(),
        "encoders": encoders,
    }


def _encode(place: Workplace, store: Store, device: str) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """Encode all samples into `store`, encoder by encoder; the plan, and what each encoder took."""
    family, plan = place.family, place.plan(store)
    log = EventLog(place.folder / "events.jsonl", "cache")
    model, workers = str(place.model), 0 if place.tiny else min(8, os.cpu_count() or 1)
    encoders: dict[str, dict[str, Any]] = {}
    for encoder in (None, *family.encoders):
        built = family.seconds_building
        result = encode_missing(plan, [encoder], family, model, place.dtype, device, 4, store, log, num_workers=workers)
        if result.failed:
            raise SystemExit(f"pictures could not be encoded: {result.failed}")
        seconds = result.seconds - (family.seconds_building - built)
        encoders[str(encoder)] = {"seconds": seconds, "records": result.encoded, "bytes": result.bytes_written}
    return plan, encoders


def train_row(place: Workplace, row: Row, device: str) -> dict[str, Any]:
    """The findings of a row: seconds a step, samples a second, peak memory, losses; or where memory ran out."""
    doing = ["loading"]

    def say(words: str) -> None:
        doing.append(words)
        print(f"  {words}", file=sys.stderr, flush=True)

    with _deterministic(row.deterministic):
        try:
            return _train(place, row, device, say)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            return {"out_of_memory": doing[-1], "message": str(error).splitlines()[0], "peak_bytes": peak_bytes()}


def _train(place: Workplace, row: Row, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    family, config = place.family, _settings(row)
    manifest = Manifest.load(place.folder / MANIFEST)
    names, reader = list(manifest.samples), CachedSamples(place.store, manifest)
    started = time.perf_counter()
    say("opening the source")
    source = _source(place, family, row.way, manifest, device)
    say("loading the transformer")
    transformer = load_frozen(str(place.model), family, config, place.dtype, device)
    add_lora(transformer, family, config)
    synchronize(device)
    loaded, loading_seconds = _allocated(device), time.perf_counter() - started
    accelerator = make_accelerator(config, device)
    states: list[TrainState] = []
    say("step 1")
    for state in train_lora(transformer, family, source, names, config, accelerator):
        states.append(state)
        words = f"  {state.step_seconds:.2f} s, of it {state.load_seconds:.2f} s waiting for embeddings"
        print(f"{words}, loss {state.loss:.6f}", file=sys.stderr, flush=True)
        if state.step < row.steps:
            say(f"step {state.step + 1}")
    timed = states[WARM_UP_STEPS:] or states
    seconds = fmean(state.step_seconds for state in timed)
    findings: dict[str, Any] = {
        "seconds_per_step": seconds,
        "samples_per_second": row.batch / seconds,
        "load_share": fmean(state.load_seconds for state in timed) / seconds,
        "peak_bytes": peak_bytes(),
        "loaded_bytes": loaded,
        "loading_seconds": loading_seconds,
        "losses": [state.loss for state in states],
        "memory_plan": _memory_plan(place, family, config, reader, names[0]),
        "text_tokens": len(reader.artifact(names[0], "prompt_embeds")),
    }
    if device.startswith("cuda"):
        findings["reserved_bytes"] = torch.cuda.max_memory_reserved()
    if isinstance(source, MixedSource):
        findings["encoded_live"] = len(source.encoded_live)
    if isinstance(source, LiveSource):
        say("comparing embeddings")
        findings["embeddings_identical"] = _embeddings_identical(source, reader, names[:COMPARED_SAMPLES])
    return findings


def _settings(row: Row) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "steps": row.steps,
            "batch_size": row.batch,
            "base_quantization": row.base,
            "gradient_checkpointing": row.checkpointing,
            "offload": "group" if row.offload else "none",
            "checkpoint_every": row.steps,
        }
    )


def _source(place: Workplace, family: Any, way: str, manifest: Manifest, device: str) -> Source:
    def live() -> LiveSource:
        components = {*family.encoders, *(name for beside in family.encoders.values() for name in beside)}
        pipe = family.load_pipeline(str(place.model), sorted(components), place.dtype, device)
        return LiveSource(pipe, family, place.samples, place.sizes, empty_prompts=False)

    if way == "live":
        return live()
    if way == "cached":
        return CachedSource(CachedSamples(place.store, manifest))
    kept = set(shared_out(list(manifest.samples), SHARE))
    part = manifest.without([name for name in manifest.samples if name not in kept])
    return MixedSource(CachedSource(CachedSamples(place.store, part)), live, lambda text: None)


def _memory_plan(place: Workplace, family: Any, config: TrainConfig, reader: CachedSamples, name: str) -> Any:
    shapes = tuple(tuple(row) for row in reader.artifact(name, "img_shapes").tolist())
    size = BatchSize(shapes, len(reader.artifact(name, "prompt_embeds")))
    return plan_memory(place.model, family, config, place.dtype, size).as_dict()


def _embeddings_identical(live: LiveSource, reader: CachedSamples, names: list[str]) -> bool:
    """Whether what is encoded now is what was stored, bit for bit."""
    for name, tensors in zip(names, live.load(names), strict=True):
        stored = reader.load(name)
        if not all(torch.equal(tensor.cpu(), stored[artifact]) for artifact, tensor in tensors.items()):
            return False
    return True


def _allocated(device: str) -> int | None:
    return torch.cuda.memory_allocated() if device.startswith("cuda") else None


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Kernels that give the same sums each time, where there are such; the rest warns."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
