"""What is asked of a setting, and what measured pictures promise of unseen ones."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

Metric = Literal["psnr", "ssim", "flip", "speedup"]
Promise = Literal["each", "mean"]

CONFIDENCE = 0.975
"""Share of unseen pictures (or of further means) for which a bound is meant to hold. The promise is 0.95; the fastest
of several settings that look good is more often one that looks better than it is, and the difference pays for that."""

_CAP = 100.0  # dB: beyond it pictures are identical
_REACH: dict[Metric, float] = {"psnr": 15.0, "ssim": 15.0, "flip": 7.5, "speedup": math.inf}
"""How far beyond the target a value is of use to the bound, as `goodness`."""
_PATTERN = re.compile(r"\s*(?P<metric>\w+)\s*(?P<sign>>=|<=|>|<|=)\s*(?P<value>[-+\d.eE]+)\s*")
_SIGNS: dict[Metric, str] = {"psnr": ">=", "ssim": ">=", "flip": "<=", "speedup": ">="}
_RANGES: dict[Metric, tuple[float, float]] = {
    "psnr": (0.0, _CAP),
    "ssim": (-1.0, 1.0),
    "flip": (0.0, 1.0),
    "speedup": (1.0, 1000.0),
}


@dataclass(frozen=True)
class Target:
    """`psnr>=35`, `ssim>=0.97`, `flip<=0.05` or `speedup>=2`."""

    metric: Metric
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target; raises ValueError that says what one looks like."""
        example = "expected psnr>=35, ssim>=0.97, flip<=0.05 or speedup>=2"
        found = _PATTERN.fullmatch(text)
        if found is None or found["metric"].lower() not in _SIGNS:
            raise ValueError(f"{text!r} is no target; {example}")
        metric = cast(Metric, found["metric"].lower())
        try:
            value = float(found["value"])
        except ValueError as error:
            raise ValueError(f"{found['value']!r} in {text!r} is no number; {example}") from error
        lowest, highest = _RANGES[metric]
        if found["sign"] != _SIGNS[metric]:
            raise ValueError(f"{metric} takes {_SIGNS[metric]}, found {found['sign']!r} in {text!r}; {example}")
        if not lowest <= value <= highest:
            raise ValueError(f"{metric} lies between {lowest:g} and {highest:g}, found {value:g}")
        return cls(metric, value)

    def __str__(self) -> str:
        return f"{self.metric}{_SIGNS[self.metric]}{self.value:g}"

    def met_by(self, value: float) -> bool:
        """Whether a measured value keeps to it."""
        return value <= self.value if _SIGNS[self.metric] == "<=" else value >= self.value

    def kept_by(self, values: Sequence[float], promise: Promise) -> bool:
        """Whether measured pictures keep to it: every one of them, or their mean."""
        return self.met_by(statistics.fmean(values)) if promise == "mean" else all(map(self.met_by, values))

    def promised_by(self, values: Sequence[float], promise: Promise) -> bool:
        """Whether measured pictures promise that unseen ones keep to it."""
        enough = goodness(self.metric, self.value) + _REACH[self.metric]
        return self.kept_by(values, promise) and self.met_by(bound(self.metric, values, promise, enough))


def bound(metric: Metric, values: Sequence[float], promise: Promise, enough: float = math.inf) -> float:
    """What an unseen picture (or the mean of as many unseen ones) keeps to with `CONFIDENCE`, from measured ones.

    A one-sided prediction bound of the normal distribution: mean - t s sqrt(1 + 1/n), for a mean
    mean - t s sqrt(2/n). SSIM and FLIP are taken as decibels of their distance from identity, where they are closer
    to normal.

    Args:
        values: two or more.
        enough: as `goodness`; better values count as this. Pictures in which nothing was skipped are identical, and
            how far they are from the others says nothing about how far those are from the target.
    """
    scaled = [min(goodness(metric, value), enough) for value in values]
    count = len(scaled)
    spread = statistics.stdev(scaled) * math.sqrt(2 / count if promise == "mean" else 1 + 1 / count)
    return _value(metric, statistics.fmean(scaled) - student_t(CONFIDENCE, count - 1) * spread)


def goodness(metric: Metric, value: float) -> float:
    """The metric on a scale on which more is better: decibels, for a speed-up its logarithm."""
    if metric == "psnr":
        return min(value, _CAP)
    if metric == "speedup":
        return math.log(value)
    distance = 1 - value if metric == "ssim" else value
    return min(_CAP, -10 * math.log10(max(distance, 1e-10)))


def _value(metric: Metric, scaled: float) -> float:
    """Inverse of `goodness`."""
    if metric == "psnr":
        return scaled
    if metric == "speedup":
        return math.exp(scaled)
    distance = float(10 ** (-scaled / 10))
    return 1 - distance if metric == "ssim" else distance


def student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution: exact for 1 and 2 degrees of freedom, else within 0.5 %.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5 (an expansion around the normal quantile).
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        alpha = 4 * probability * (1 - probability)
        return float(2 * (probability - 0.5) * math.sqrt(2 / alpha))
    x = statistics.NormalDist().inv_cdf(probability)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return math.fsum(term / float(freedom) ** power for power, term in enumerate(terms))
