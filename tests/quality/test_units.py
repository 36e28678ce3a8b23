"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from dittocache.quality.units import (
    bytes_text,
    count_text,
    decibels_text,
    gain_text,
    plural,
    ratio_text,
    seconds_text,
    similarity_text,
    three_digits,
)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(1536), "1.50 KiB"),
        (bytes_text(1023 * 1024), "0.999 MiB"),
        (bytes_text(25 * 2**20), "25.0 MiB"),
        (bytes_text(3 * 2**40), "3.00 TiB"),
        (bytes_text(None), "–"),
        (seconds_text(0.0421), "42.1 ms"),
        (seconds_text(0.99960), "1.00 s"),
        (seconds_text(3.456), "3.46 s"),
        (seconds_text(59.6), "59.6 s"),
        (seconds_text(192), "3 min 12 s"),
        (seconds_text(3599.7), "1 h 00 min"),
        (seconds_text(None), "–"),
        (decibels_text(31.26), "31.3 dB"),
        (decibels_text(math.inf), "identical"),
        (decibels_text(math.nan), "–"),
        (gain_text(3.14), "+3.1 dB"),
        (gain_text(-0.26), "−0.3 dB"),
        (ratio_text(2.056), "2.06×"),
        (similarity_text(1.0), "1"),
        (similarity_text(0.99999999), "0.9999"),
        (similarity_text(0.9876), "0.988"),
        (similarity_text(-0.1), "−0.100"),
        (count_text(28.0), "28"),
        (count_text(14.5), "14.5"),
        (count_text(12000), "12,000"),
        (count_text(math.nan), "–"),
        (plural(1, "record"), "1 record"),
        (plural(1200, "record"), "1,200 records"),
        (three_digits(0), "0"),
        (three_digits(0.0999), "0.0999"),
        (three_digits(9.999), "10.0"),
        (three_digits(123.4), "123"),
    ],
)
def test_text(found: str, expected: str) -> None:
    assert found == expected
