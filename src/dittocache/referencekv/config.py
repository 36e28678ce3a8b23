"""Settings of the reference-image KV cache."""

from __future__ import annotations

from pydantic import Field

from dittocache.settings import Settings


class ReferenceKVConfig(Settings):
    """Keys and values of reference tokens are kept per block and reused in later steps."""

    refresh: int | None = Field(default=None, ge=1)
    """References are computed anew every so many computed steps; None: only at the first; 1: every step, as stock."""
