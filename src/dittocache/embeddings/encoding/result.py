"""What encoding did, and what storing it has cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EncodeResult:
    """What one call of `EncoderSession.encode` or `encode_missing` did.

    Attributes:
        encoded: records that were computed and stored.
        reused: records that were there already.
        samples: samples that passed an encoder.
        bytes_written: length of the new records.
        seconds: wall time, the loading of encoders included where `encode_missing` loads them.
        failed: picture file -> why its sample could not be encoded.
        failed_samples: the names of those samples, for `Manifest.without`.
        tiled: names of samples whose pictures passed the VAE in tiles, for want of memory.
    """

    encoded: int = 0
    reused: int = 0
    samples: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    failed_samples: list[str] = field(default_factory=list)
    tiled: list[str] = field(default_factory=list)

    def add(self, other: EncodeResult) -> None:
        """Take in what another call did."""
        self.encoded += other.encoded
        self.reused += other.reused
        self.samples += other.samples
        self.bytes_written += other.bytes_written
        self.seconds += other.seconds
        self.failed |= other.failed
        self.failed_samples += other.failed_samples
        self.tiled += other.tiled

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)
