"""Settings of the `cache` section."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dittocache.settings import Settings


class CacheConfig(Settings):
    """The embedding cache of a run."""

    use_cache: bool = True
    """Train on cached embeddings. False encodes every sample in every step (live)."""

    cache_dir: Path = Path("cache")
    """Folder of the store; several runs and data sets may share one."""

    devices: dict[Literal["vae", "text_encoder", "text_encoder_2"], str] = Field(default_factory=dict)
    """Device of each encoder while caching, for example `{vae: "cuda:0"}`; others use `model.device`."""

    batch_size: int = Field(default=4, ge=1)
    """Samples that an encoder takes at once."""
