"""What a setting costs and saves on one sample, and a ledger on disk so that nothing is run twice."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from dittocache.quality.metrics import capped, psnr, ssim
from dittocache.quality.metrics_flip import flip
from dittocache.quality.tuning.settings import UNCACHED, Setting
from dittocache.quality.tuning.target import Metric
from dittocache.sampling.generate import Picture


@dataclass(frozen=True)
class Measurement:
    """One picture beside the uncached one of the same sample.

    Attributes:
        passes, uncached_passes: calls of the transformer that ran its blocks, each by its share of the tokens' work.
        seconds, uncached_seconds: wall time of the pipeline's whole call.
        transformer_seconds, uncached_transformer_seconds: of it within the transformer.
        lpips: None where it was not asked for.
    """

    psnr: float
    ssim: float
    flip: float
    passes: float
    uncached_passes: float
    seconds: float
    uncached_seconds: float
    transformer_seconds: float
    uncached_transformer_seconds: float
    lpips: float | None = None

    @property
    def speedup(self) -> float:
        """By transformer passes."""
        return self.uncached_passes / self.passes


def values_of(metric: Metric, measured: Sequence[Measurement]) -> list[float]:
    """The metric of each sample."""
    return [float(getattr(one, metric)) for one in measured]


def mean_speedup(measured: Sequence[Measurement]) -> float:
    """By transformer passes, over all samples."""
    return sum(one.uncached_passes for one in measured) / sum(one.passes for one in measured)


def wall_speedup(measured: Sequence[Measurement]) -> float:
    """By wall time of the whole call: the median, which a busy moment does not move."""
    return statistics.median(one.uncached_seconds / one.seconds for one in measured)


class Sample(Protocol):
    """A picture to make: prompt, references and noise."""

    @property
    def key(self) -> str:
        """What determines the picture besides model and setting; fit for a file name."""
        ...

    def make(self, setting: Setting) -> Picture:
        """The picture."""
        ...


class Ledger:
    """Measures settings on samples and remembers, also after an interrupt: `measurements.jsonl` and uncached pictures.

    Args:
        folder: of one model and kind of run.
        advance: called for every picture that was made or remembered.
        perceptual: LPIPS of two pictures, where it is wanted.
    """

    def __init__(
        self,
        folder: Path,
        advance: Callable[[], None] = lambda: None,
        perceptual: Callable[[Image.Image, Image.Image], float] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = folder / "measurements.jsonl"
        self._advance = advance
        self._perceptual = perceptual
        self._known: dict[tuple[str, str], Measurement] = {}
        self._uncached: dict[str, tuple[Image.Image, Measurement]] = {}
        self.made = 0
        """Pictures that had to be made."""
        for line in self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else ():
            self._remember(line)

    def measure(self, setting: Setting, samples: Sequence[Sample]) -> list[Measurement]:
        """The setting on every sample, run where it is not known."""
        return [self._one(setting, sample) for sample in samples]

    def wall_speedup(self, setting: Setting, samples: Sequence[Sample]) -> float:
        """By wall time of the whole call, uncached and cached runs taking turns, so that a busy machine slows both.

        The median over `samples`, each run anew.
        """
        ratios = []
        for sample in samples:
            ratios.append(sample.make(UNCACHED).seconds / sample.make(setting).seconds)
            self.made += 2
            self._advance()
        return statistics.median(ratios)

    def settings_of(self, settings: Sequence[Setting], samples: Sequence[Sample]) -> list[Setting]:
        """Those settings that are known on all samples."""
        return [one for one in settings if all((one.key, sample.key) in self._known for sample in samples)]

    def _one(self, setting: Setting, sample: Sample) -> Measurement:
        image, uncached = self._uncached_of(sample)
        key = (setting.key, sample.key)
        if key not in self._known:
            made = sample.make(setting)
            found = _measurement(made, image, uncached)
            if self._perceptual is not None:
                found = Measurement(**{**asdict(found), "lpips": self._perceptual(made.image, image)})
            self._write(key, found)
        self._advance()
        return self._known[key]

    def _uncached_of(self, sample: Sample) -> tuple[Image.Image, Measurement]:
        """The uncached picture, and its measurement against itself."""
        if sample.key not in self._uncached:
            key, file = (UNCACHED.key, sample.key), self._folder / f"{sample.key}.png"
            if key in self._known and file.exists():
                self._uncached[sample.key] = Image.open(file).convert("RGB"), self._known[key]
            else:
                made = sample.make(UNCACHED)
                made.image.save(file)
                passes, inside = made.trace.passes, made.trace.seconds
                own = Measurement(100.0, 1.0, 0.0, passes, passes, made.seconds, made.seconds, inside, inside)
                self._write(key, own)
                self._uncached[sample.key] = made.image, own
        return self._uncached[sample.key]

    def _write(self, key: tuple[str, str], found: Measurement) -> None:
        self.made += 1
        self._known[key] = found
        line = json.dumps({"setting": key[0], "sample": key[1], **asdict(found)}) + "\n"
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def _remember(self, line: str) -> None:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            return
        setting, sample = row.pop("setting"), row.pop("sample")
        if self._perceptual is None or row["lpips"] is not None or setting == UNCACHED.key:
            self._known[setting, sample] = Measurement(**row)


def _measurement(made: Picture, image: Image.Image, uncached: Measurement) -> Measurement:
    return Measurement(
        psnr=capped(psnr(made.image, image)),
        ssim=ssim(made.image, image),
        flip=flip(made.image, image),
        passes=made.trace.passes,
        uncached_passes=uncached.passes,
        seconds=made.seconds,
        uncached_seconds=uncached.seconds,
        transformer_seconds=made.trace.seconds,
        uncached_transformer_seconds=uncached.transformer_seconds,
    )
