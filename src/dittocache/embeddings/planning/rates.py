"""How long encoding takes on this machine, learnt from earlier encodings; what was never measured is not known."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dittocache.data.sample import Sample
from dittocache.errors import StoreUnavailableError
from dittocache.families.base import Sizes
from dittocache.families.estimates import SizeEstimator

RATES_VERSION = 1
_REMEMBERED = 1000.0  # samples: a machine that has become faster is believed after so many


class Rates:
    """Seconds a sample by encoder class, dtype, kind of device and resolution, in one JSON file.

    Args:
        path: the file; it need not exist. A damaged one is started afresh.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def seconds_per_sample(self, encoder: str, dtype: str, device: str, resolution: int) -> float | None:
        """What a sample took so far; None where that was never measured.

        Args:
            encoder: the encoder's class, `AutoencoderKLQwenImage`.
            dtype: `bfloat16`; device: `cuda`, without its number; resolution: side in pixels of a square picture.
        """
        samples, seconds = self._known().get(_name(encoder, dtype, device, resolution), (0.0, 0.0))
        return seconds / samples if samples else None

    def record(self, encoder: str, dtype: str, device: str, resolution: int, *, samples: int, seconds: float) -> None:
        """Learn that so many samples took so many seconds, loading left out.

        Raises StoreUnavailableError when the file cannot be written.
        """
        if samples <= 0 or not (math.isfinite(seconds) and seconds > 0):
            return
        known = dict(self._known())
        name = _name(encoder, dtype, device, resolution)
        before, before_seconds = known.get(name, (0.0, 0.0))
        kept = min(1.0, _REMEMBERED / before) if before else 0.0
        known[name] = (before * kept + samples, before_seconds * kept + seconds)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"version": RATES_VERSION, "rates": known}, indent=1), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreUnavailableError(
                f"the measured times {self.path} cannot be written ({error.strerror or error}); free space there"
            ) from error

    def _known(self) -> Mapping[str, tuple[float, float]]:
        try:
            content: Any = json.loads(self.path.read_bytes())
            if content["version"] != RATES_VERSION:
                return {}
            found = {
                str(name): (float(samples), float(seconds)) for name, (samples, seconds) in content["rates"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}  # it is learnt again
        return {name: pair for name, pair in found.items() if all(math.isfinite(one) and one > 0 for one in pair)}


@dataclass(frozen=True)
class Forecast:
    """What a plan needs to tell how much is still to come.

    Attributes:
        samples: those of the plan's table, in its order.
        estimator: of the family and checkpoint; None where there is none.
        rates: of earlier encodings; None where nobody remembers.
        classes: of the encoders.
        devices: where they will run.
    """

    samples: Sequence[Sample] = ()
    estimator: SizeEstimator | None = None
    rates: Rates | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)

    def seconds_per_sample(self, encoder: str, dtype: torch.dtype, sizes: Sizes) -> float | None:
        """What a sample takes; None where that was never measured."""
        if self.rates is None:
            return None
        device = self.devices.get(encoder, "cpu")
        name = str(dtype).removeprefix("torch.")
        return self.rates.seconds_per_sample(self.classes[encoder], name, device, sizes.resolution)


def record_rate(
    path: Path, encoder: str, dtype: str, device: str, resolution: int, *, samples: int, seconds: float
) -> None:
    """As `Rates(path).record`."""
    Rates(path).record(encoder, dtype, device, resolution, samples=samples, seconds=seconds)


def _name(encoder: str, dtype: str, device: str, resolution: int) -> str:
    return f"{encoder}/{dtype}/{device.partition(':')[0]}/{resolution}"
