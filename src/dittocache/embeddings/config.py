"""Settings of the `cache` section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dittocache.settings import Settings

EncoderName = Literal["vae", "text_encoder", "text_encoder_2"]


def _folder_or_url(value: Any) -> Any:
    """A path, except where the text is a URL: a `Path` would fold its `//` into one slash."""
    if not isinstance(value, str | Path):
        raise ValueError("a path or a URL")
    return Path(value) if isinstance(value, str) and "://" not in value else value


class CacheConfig(Settings):
    """The embedding cache of a run."""

    use_cache: bool = True
    """Train on cached embeddings. False encodes every sample in every step (live)."""

    cache_dir: Annotated[Path | str, BeforeValidator(_folder_or_url)] = Path("cache")
    """Folder of the store, or a URL such as `s3://bucket/cache`; several runs and data sets may share one."""

    devices: dict[EncoderName, str] = Field(default_factory=dict)
    """Device of each encoder while caching, for example `{vae: "cuda:0"}`; others use `model.device`. Encoders on
    different devices work at the same time, encoders on one device one after the other."""

    batch_size: int | None = Field(default=None, ge=1)
    """Samples that any encoder takes at once; left out, the two settings below count."""

    latent_batch_size: int = Field(default=4, ge=1)
    """Samples that the VAE takes at once; halved when memory runs out."""

    text_batch_size: int = Field(default=16, ge=1)
    """Samples that a text encoder takes at once; halved when memory runs out."""

    batching: Literal["exact", "together"] = "exact"
    """`exact`: samples pass an encoder one by one, so that cached training equals live training bit for bit.
    `together`: samples of one bucket in one call; faster on a GPU, and other in the last bits. They have other keys."""

    num_workers: int = Field(default=8, ge=0)
    """Most processes that decode pictures ahead of an encoder; never more than there are cores. 0 decodes in line."""

    latent_num_workers: int | None = Field(default=None, ge=0)
    """The same for the VAE alone; left out, `num_workers` counts."""

    text_num_workers: int | None = Field(default=None, ge=0)
    """The same for the text encoders alone; left out, `num_workers` counts."""

    text_encoder_fp8: bool = False
    """Hold the text encoders' weights in 8 bits while encoding: about half their memory (8 GB with Qwen2.5-VL), and
    embeddings that differ by some percent from those that pictures are made with. They have other keys."""

    workers: int = Field(default=1, ge=1)
    """Processes that encode side by side, each with the encoder in memory; several GPUs are dealt out among them."""

    runner: Literal["local", "ray"] = "local"
    """Who starts the workers: `local` this machine, `ray` the Ray cluster that this process can reach (extra `ray`)."""

    lease_seconds: float = Field(default=60.0, ge=1.0)
    """After this time without a sign of life, what a worker on another machine was encoding is given to others."""

    skip_existing: bool = True
    """Encode only what is missing. False encodes everything once more and replaces what is stored."""

    latent_skip_existing: bool | None = None
    """The same for latents alone; left out, `skip_existing` counts."""

    text_skip_existing: bool | None = None
    """The same for prompt embeddings alone; left out, `skip_existing` counts."""

    keep_cache: bool = True
    """False removes, after a training that succeeded, what this run cached and no other run uses."""

    latent_keep_cache: bool | None = None
    """The same for latents alone; left out, `keep_cache` counts."""

    text_keep_cache: bool | None = None
    """The same for prompt embeddings alone; left out, `keep_cache` counts."""

    storage: Literal["native", "float16", "fp8"] = "native"
    """How tensors are stored: `native` in the encoder's own dtype, `float16`, or `fp8`: prompt embeddings in 8 bits
    with a scale for each token, which halves the cache and costs about 2 % relative error."""

    shared_prefix: bool = False
    """Store only those rows of prompt embeddings that differ from the empty prompt's of the same sample; lossless."""

    @property
    def folder(self) -> Path | None:
        """The store's folder on this machine or a mounted disk; None where `cache_dir` is a URL."""
        return self.cache_dir if isinstance(self.cache_dir, Path) else None

    @property
    def encodes_in_parallel(self) -> bool:
        """Whether the VAE and the text encoders have different devices by name, so that both can work at once."""
        text = {device for name, device in self.devices.items() if name != "vae"}
        return bool(text) and "vae" in self.devices and self.devices["vae"] not in text

    def batch_size_of(self, encoder: str | None) -> int:
        """Samples that an encoder (None: plain facts) takes at once."""
        return self.batch_size or (self.latent_batch_size if _of_latents(encoder) else self.text_batch_size)

    def num_workers_of(self, encoder: str | None) -> int:
        """Most processes that decode pictures ahead of an encoder."""
        own = self.latent_num_workers if _of_latents(encoder) else self.text_num_workers
        return self.num_workers if own is None else own

    def skips_existing(self, encoder: str | None) -> bool:
        """Whether only what is missing is encoded by an encoder."""
        own = self.latent_skip_existing if _of_latents(encoder) else self.text_skip_existing
        return self.skip_existing if own is None else own

    def keeps(self, encoder: str | None) -> bool:
        """Whether what an encoder made for this run stays in the cache after training."""
        own = self.latent_keep_cache if _of_latents(encoder) else self.text_keep_cache
        return self.keep_cache if own is None else own


def _of_latents(encoder: str | None) -> bool:
    """Whether an encoder (None: plain facts) belongs to the stage that caches latents."""
    return encoder in ("vae", None)
