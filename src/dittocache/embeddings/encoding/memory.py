"""When memory runs out: how to tell, what to give back, and how the VAE gets by with less."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY_WORDS)


def free_memory(pipe: Any = None) -> None:
    """Give back what nothing refers to any more, and what the VAE of `pipe` holds since it was interrupted."""
    clear = getattr(getattr(pipe, "vae", None), "clear_cache", None)
    if clear is not None:
        clear()  # causal VAEs keep their last activations in themselves
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def can_tile(pipe: Any) -> bool:
    """Whether the VAE of `pipe` can encode a picture in tiles, and does not do so already."""
    vae = getattr(pipe, "vae", None)
    return callable(getattr(vae, "enable_tiling", None)) and not getattr(vae, "use_tiling", False)


@contextmanager
def tiling(pipe: Any, wanted: bool) -> Iterator[None]:
    """Where `wanted`, the VAE encodes in overlapping tiles: less memory, and latents that differ a little."""
    if not wanted:
        yield
        return
    pipe.vae.enable_tiling()
    try:
        yield
    finally:
        pipe.vae.disable_tiling()
