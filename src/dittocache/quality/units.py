"""Numbers as people read them: bytes, seconds, decibels and ratios with sensible digits."""

from __future__ import annotations

import math

UNKNOWN = "\N{EN DASH}"
"""Stands where a number was not measured."""


def bytes_text(count: int | None) -> str:
    """`1536` -> `1.5 KiB`; binary units, three digits at most."""
    if count is None:
        return UNKNOWN
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 999.5:
            return f"{count} B" if unit == "B" else f"{three_digits(value)} {unit}"
        value /= 1024
    return f"{three_digits(value)} TiB"


def seconds_text(seconds: float | None) -> str:
    """`0.0421` -> `42.1 ms`, `3.456` -> `3.46 s`, `192` -> `3 min 12 s`."""
    if seconds is None or math.isnan(seconds):
        return UNKNOWN
    if seconds < 0.9995:
        return f"{three_digits(seconds * 1000)} ms"
    if seconds < 99.5:
        return f"{three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def decibels_text(decibels: float) -> str:
    """`31.26` -> `31.3 dB`; infinite: `identical`."""
    if math.isnan(decibels):
        return UNKNOWN
    return "identical" if decibels == math.inf else f"{_signed_minus(f'{decibels:.1f}')} dB"


def gain_text(decibels: float) -> str:
    """`3.14` -> `+3.1 dB`, always with its sign."""
    return UNKNOWN if math.isnan(decibels) else f"{_signed_minus(f'{decibels:+.1f}')} dB"


def ratio_text(ratio: float) -> str:
    """`2.056` -> `2.06×`."""
    return UNKNOWN if math.isnan(ratio) else f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def similarity_text(similarity: float) -> str:
    """`0.98765` -> `0.988`. Only an exact 1 is written `1`: rounding must not claim identity."""
    if math.isnan(similarity):
        return UNKNOWN
    if similarity == 1.0:
        return "1"
    return _signed_minus(f"{min(similarity, 0.9999):.4f}" if similarity > 0.9995 else f"{similarity:.3f}")


def perceived_text(flip: float) -> str:
    """`0.01234` -> `0.012`, a small one with as many digits as it needs. Only an exact 0 is written `0`."""
    if math.isnan(flip):
        return UNKNOWN
    if flip == 0.0:
        return "0"
    return f"{flip:.3f}" if flip >= 0.0095 else f"{max(flip, 0.0001):.4f}"


def count_text(count: float) -> str:
    """`28.0` -> `28`, `14.5` -> `14.5`, `12000` -> `12,000`."""
    if math.isnan(count):
        return UNKNOWN
    return f"{round(count):,}" if abs(count - round(count)) < 0.05 else f"{count:,.1f}"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: `0.123`, `1.23`, `12.3`, `123`."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{value:.{max(0, 2 - magnitude)}f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 record`, `2 records`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _signed_minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
