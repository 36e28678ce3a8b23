"""What every stage works on, opened from a run's settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from dittocache.config import BUNDLED, RunConfig
from dittocache.data.digests import ContentIndex
from dittocache.data.loading import load_samples
from dittocache.data.sample import Sample
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.planning.rates import Rates
from dittocache.embeddings.store import roots
from dittocache.embeddings.store.storage import Storage
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, ConfigError, StoreUnavailableError
from dittocache.events import EventLog
from dittocache.families.base import Family, Sizes
from dittocache.families.fp8_encoders import fp8_forms, with_fp8_text_encoders
from dittocache.families.registry import family_of_model, get_family
from dittocache.jobs.ranks import Rank, device_of_worker, rank_of

INDEX_NAME = "content-index.json"
MANIFEST_NAME = "manifest.json"
MEMORY_NAME = "memory"
RATES_NAME = "rates.json"


@dataclass(frozen=True)
class RunInputs:
    """Model, data and cache of a run; each is opened when first asked for.

    Attributes:
        worker: 0, or the number of this process among those that a caching stage has started beside itself.
        after: descriptor that is at its end when the stage that runs beside this one has ended; None where none does.
    """

    config: RunConfig
    run_dir: Path
    worker: int = 0
    after: int | None = None

    @cached_property
    def model(self) -> str:
        """Folder or hub id of the checkpoint."""
        if self.config.model.path != BUNDLED:
            return self.config.model.path
        from dittocache.demo.model import MODEL_DIR

        return str(MODEL_DIR)

    @cached_property
    def family(self) -> Family:
        """As named in the settings, else the checkpoint's; raises ModelError."""
        name = self.config.model.family
        return get_family(name) if name is not None else family_of_model(self.model)

    @cached_property
    def encoding_family(self) -> Family:
        """The family as embeddings are made with it, cached or live; raises ModelError."""
        return with_fp8_text_encoders(self.family) if self.config.cache.text_encoder_fp8 else self.family

    @cached_property
    def dtype(self) -> torch.dtype:
        """Number format of frozen weights."""
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[self.config.model.dtype]

    @cached_property
    def device(self) -> str:
        """Where the transformer runs, and encoders without a device of their own; raises ConfigError."""
        return resolve_device(self.config.model.device, "model.device")

    @cached_property
    def sizes(self) -> Sizes:
        """To what size pictures are brought."""
        return Sizes(self.config.data.side, self.config.data.condition_resolution)

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """The training set; raises DataError listing every problem."""
        return load_samples(self.config.data, self.family.size_multiple, self._memory)

    @cached_property
    def held_out(self) -> Sequence[Sample]:
        """The held-out set, unmirrored and in one resolution; empty where there is none, raises as `samples`."""
        if self.config.held_out is None:
            return []
        held_out = self.config.data.held_out(self.config.held_out)
        return load_samples(held_out, self.family.size_multiple, self._memory)

    @property
    def _memory(self) -> Path | None:
        """Where it is remembered what was read of data sets; nowhere for live training, which writes no cache."""
        if not self.config.cache.use_cache:
            return None
        return (self.config.cache.folder or self.run_dir) / MEMORY_NAME

    @cached_property
    def store(self) -> Store:
        """The embedding store."""
        return Store(self.config.cache.cache_dir)

    @property
    def manifest_path(self) -> Path:
        """The manifest that training reads."""
        return self.run_dir / MANIFEST_NAME

    @cached_property
    def rank(self) -> Rank:
        """This process among those that torchrun or Slurm started; raises ConfigError."""
        return rank_of(os.environ)

    @property
    def leads(self) -> bool:
        """Whether this process owns the run: it waits for the other workers and writes the manifest."""
        return self.worker == 0 and self.rank.index == 0

    def wait_for_stage_beside(self) -> None:
        """Return when the stage that runs at the same time as this one has ended."""
        while self.after is not None and os.read(self.after, 1):
            pass

    def encoder_device(self, encoder: str | None) -> str:
        """Where an encoder runs while caching, for this worker; raises ConfigError for a device that is not there."""
        named = {str(name): device for name, device in self.config.cache.devices.items()}.get(encoder or "")
        device = self.device if named is None else resolve_device(named, f"cache.devices.{encoder}")
        position = self.rank.local * self.config.cache.workers + self.worker
        if position == 0:
            return device
        return device_of_worker(device, position, torch.cuda.device_count())

    def plan(self) -> Plan:
        """What is cached and what is still to encode; the last run's manifest tells why records are stale."""
        previous = Manifest.load(self.manifest_path) if self.manifest_path.exists() else None
        # Beside the store it serves every run; a store behind a URL is no place for a file that each plan rewrites.
        beside = self.config.cache.folder or self.run_dir
        index = ContentIndex(beside / INDEX_NAME)
        return make_plan(
            self.samples,
            self.family,
            self.sizes,
            self.model,
            self.dtype,
            self.store,
            index,
            previous=previous,
            storage=Storage(self.config.cache.storage, self.config.cache.shared_prefix),
            batching=self.config.cache.batching,
            rates=Rates(beside / RATES_NAME),
            devices={encoder: self.encoder_device(encoder) for encoder in self.family.encoders},
            held_in=fp8_forms(self.family) if self.config.cache.text_encoder_fp8 else None,
        )


def latent_encoders(family: Family) -> list[str | None]:
    """What stage `cache_latents` computes: plain facts and everything that the VAE makes."""
    return [None, *(encoder for encoder in family.encoders if encoder == "vae")]


def text_encoders(family: Family) -> list[str | None]:
    """What stage `cache_text` computes."""
    return [encoder for encoder in family.encoders if encoder != "vae"]


def records_of(plan: Plan, encoders: Sequence[str | None]) -> set[str]:
    """Keys of all records that these encoders make for the data set."""
    return {key for encoder in encoders for need in plan.needs.get(encoder, ()) for key in need.keys.values()}


def complete_part(manifest: Manifest, store: Store) -> Manifest:
    """The samples whose every record is in the store: what can be trained on without an encoder."""
    present = store.sizes(manifest.keys)
    return manifest.without([name for name, keys in manifest.samples.items() if set(keys.values()) - present.keys()])


def save_manifest(inputs: RunInputs, manifest: Manifest, log: EventLog) -> None:
    """Write the run's manifest and tell the store that the run uses its records."""
    manifest.save(inputs.manifest_path)
    if not inputs.store.is_local:
        return
    try:
        roots.register(inputs.store, inputs.manifest_path, manifest.keys, saved=True)
    except StoreUnavailableError as error:  # a store that can only be read can still be trained on
        log.message(f"{error}; `dittocache cache gc` run by others may remove what this run uses", level="warning")


def load_manifest(inputs: RunInputs) -> Manifest:
    """The run's manifest; raises CacheError when nothing was cached, or nothing of it can be used."""
    manifest = Manifest.load(inputs.manifest_path)
    if not manifest.samples:
        raise CacheError(
            f"{inputs.manifest_path} names no sample: none could be cached; run `dittocache cache` and see its log"
        )
    return manifest


def resolve_device(name: str, field: str) -> str:
    """A device that is there: `auto` becomes the first GPU, else the CPU; raises ConfigError naming `field`."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{field}: found {name!r}; expected auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"{field}: {name!r} is not there; this machine has {count} CUDA device(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{field}: 'mps' is not there; it needs a Mac with Apple silicon")
    return name
