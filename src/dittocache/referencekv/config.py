"""Settings of the reference-image KV cache."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dittocache.settings import Settings

Storage = Literal["auto", "native", "fp8", "modulated_input"]


class ReferenceKVConfig(Settings):
    """Keys and values of reference tokens are kept per block and reused in later steps."""

    refresh: int | None = Field(default=None, ge=1)
    """References are computed anew every so many computed steps; None: only at the first; 1: every step, as stock."""

    storage: Storage = "auto"
    """What is kept of a reference token. `native`: K and V as computed. `fp8`: both in 8 bits, half the memory, with a
    small error. `modulated_input`: what K and V are computed from, half the memory, no error, more work at each step.
    `auto`: `native`, or what fits `max_gb`."""
    offload: bool = False
    """Keep it in the host's memory; blocks fetch theirs ahead of time. With `max_gb` it is done where nothing else
    fits."""
    max_gb: float | None = Field(default=None, gt=0)
    """Most GB (of 10^9 bytes) on the device; the fastest way to keep references that fits is taken."""
    reuse_across_calls: bool = False
    """Keep them when a call of the pipeline ends, for the next one with the same references: other prompts, seeds,
    numbers of steps. Only where they are exact; the memory is free at the end of the session."""
