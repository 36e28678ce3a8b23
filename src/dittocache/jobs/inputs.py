"""What every stage works on, opened from a run's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from dittocache.config import BUNDLED, RunConfig
from dittocache.data.config import DataConfig
from dittocache.data.digests import ContentIndex
from dittocache.data.folder import load_folder
from dittocache.data.sample import Sample
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, ConfigError
from dittocache.families.base import Family, Sizes
from dittocache.families.registry import family_of_model, get_family

INDEX_NAME = "content-index.json"
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class RunInputs:
    """Model, data and cache of a run; each is opened when first asked for."""

    config: RunConfig
    run_dir: Path

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
        return Sizes(self.config.data.resolution, self.config.data.condition_resolution)

    @cached_property
    def samples(self) -> list[Sample]:
        """The training set; raises DataError listing every problem."""
        return load_folder(self.config.data, self.family.size_multiple)

    @cached_property
    def held_out(self) -> list[Sample]:
        """The held-out set, empty where there is none; raises DataError listing every problem."""
        if self.config.held_out is None:
            return []
        settings = {**self.config.data.model_dump(), "path": self.config.held_out}
        return load_folder(DataConfig.model_validate(settings), self.family.size_multiple)

    @cached_property
    def store(self) -> Store:
        """The embedding store."""
        return Store(self.config.cache.cache_dir)

    @property
    def manifest_path(self) -> Path:
        """The manifest that training reads."""
        return self.run_dir / MANIFEST_NAME

    def encoder_device(self, encoder: str | None) -> str:
        """Where an encoder runs while caching; raises ConfigError for a device that is not there."""
        for name, device in self.config.cache.devices.items():
            if name == encoder:
                return resolve_device(device, f"cache.devices.{name}")
        return self.device

    def plan(self) -> Plan:
        """What is cached and what is still to encode; the last run's manifest tells why records are stale."""
        previous = Manifest.load(self.manifest_path) if self.manifest_path.exists() else None
        # Beside the store it serves every run; a store behind a URL is no place for a file that each plan rewrites.
        index = ContentIndex((self.config.cache.folder or self.run_dir) / INDEX_NAME)
        return make_plan(
            self.samples, self.family, self.sizes, self.model, self.dtype, self.store, index, previous=previous
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
