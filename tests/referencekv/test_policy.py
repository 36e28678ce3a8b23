"""When references are computed anew."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dittocache.referencekv.policy import refresh_now


def pattern(refresh: int | None, steps: int) -> str:
    """`F` a full step, `c` a cached one."""
    reused, marks = None, ""
    for _ in range(steps):
        full = refresh_now(refresh, reused)
        reused = 0 if full else (reused or 0) + 1
        marks += "F" if full else "c"
    return marks


@pytest.mark.parametrize(
    ("refresh", "expected"), [(None, "Fccccccc"), (1, "FFFFFFFF"), (2, "FcFcFcFc"), (3, "FccFccFc"), (99, "Fccccccc")]
)
def test_pattern(refresh: int | None, expected: str) -> None:
    assert pattern(refresh, 8) == expected


@given(st.integers(1, 12), st.integers(1, 60))
def test_every_nth_step_is_full(refresh: int, steps: int) -> None:
    assert pattern(refresh, steps) == "".join("F" if step % refresh == 0 else "c" for step in range(steps))
