"""The benchmark of ways to keep references, with small sizes: what it counts and compares."""

from __future__ import annotations

import pytest
from benchmarks.reference_kv import Case
from benchmarks.reference_kv_storage import WAYS, step_costs


def test_every_way_is_weighed_against_native() -> None:
    rows = {row["way"]: row for row in step_costs(Case(32, 64), pairs=1)}
    assert list(rows) == list(WAYS)
    native = rows["native"]
    assert native["step"] == native["theory"] == 1
    assert all(row["device"] == row["predicted"] and row["step"] > 0 for row in rows.values())
    assert rows["modulated_input"]["device"] * 2 == native["device"]
    assert rows["modulated_input"]["theory"] == pytest.approx(1 + 4 * 256**2 * 64 / Case(32, 64).cached)
    assert rows["native, offloaded"]["host"] == native["device"] == 4 * rows["native, offloaded"]["device"]
    assert [row["host"] for row in rows.values()][:3] == [0, 0, 0]
