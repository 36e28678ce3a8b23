"""The step-cache benchmarks: their arithmetic, and one small comparison from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("step_cache", "step_methods", "step_overhead", "step_peers", "step_runs", "step_tables")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports as the scripts do: their folder first on the path."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: importlib.import_module(name)
    for name in MODULES:
        sys.modules.pop(name, None)


def row(tables: ModuleType, method: str, speed: float, psnr: float, ours: bool = False) -> Any:
    return tables.Row(method, speed, ours, 1, speed, speed, speed, psnr, psnr, 1.0, 0.0)


def measured(runs: ModuleType, method: str, knob: float, edit: int, seconds: list[float], passes: list[int]) -> Any:
    return runs.Measured(method, knob, edit, 1.0, 2.0, seconds, passes, 4, 50.0, 0.9, 0.1)


def test_quality_at_a_speed_lies_on_the_front(bench: Any) -> None:
    tables = bench("step_tables")
    rows = [row(tables, "a", speed, psnr) for speed, psnr in ((1.2, 80.0), (1.8, 60.0), (1.6, 50.0), (2.2, 40.0))]
    assert [one.speed for one in tables.front(rows)] == [1.2, 1.8, 2.2]  # 1.6x at 50 dB is beaten by 1.8x at 60 dB
    assert tables.at_speed(rows, 1.5) == pytest.approx(70)
    assert tables.at_speed(rows, 2.0) == pytest.approx(50)
    assert tables.at_speed(rows, 1.0) == 80  # faster than asked for
    assert tables.at_speed(rows, 2.5) is None


def test_what_skips_nothing_is_no_end_of_a_line(bench: Any) -> None:
    tables = bench("step_tables")
    rows = [row(tables, "a", 1.0, 100.0), row(tables, "a", 2.0, 60.0)]
    assert tables.at_speed(rows, 1.5) == 60


def test_the_lead_is_over_the_best_peer_and_over_fewer_steps(bench: Any) -> None:
    tables, methods = bench("step_tables"), bench("step_methods")
    rows = [
        *(row(tables, "mine", speed, 70 - speed, ours=True) for speed in (1.1, 2.1)),
        *(row(tables, "mine too", speed, 60 - speed, ours=True) for speed in (1.1, 3.1)),
        *(row(tables, "peer", speed, 65 - speed) for speed in (1.1, 2.1)),
        *(row(tables, methods.FEWER, speed, 55 - speed) for speed in (1.1, 2.6)),
    ]
    found = tables.lead(rows)
    assert found["1.5x"]["ours"] == "mine"
    assert found["1.5x"]["above_best_peer"] == pytest.approx(5)
    assert found["2.0x"]["above_fewer_steps"] == pytest.approx(15)
    assert found["2.5x"]["ours"] == "mine too"
    assert "best_peer" not in found["2.5x"]


def test_a_skipped_step_counts_with_its_share_of_the_run_it_was_in(bench: Any) -> None:
    tables, runs, methods = bench("step_tables"), bench("step_runs"), bench("step_methods")
    setting = methods.Setting("a", 1.0, lambda pipe: None)
    # The second run met a machine ten times as busy; that changes nothing.
    seconds = [1.0, 1.0, 0.25, 1.0]
    measurements = [
        measured(runs, "a", 1.0, 0, seconds, [1, 1, 0, 1]),
        measured(runs, "a", 1.0, 1, [10 * one for one in seconds], [1, 1, 0, 1]),
    ]
    [found] = tables.rows_of(measurements, [setting])
    assert found.speed == pytest.approx(4 / 3.25)
    assert found.passes == pytest.approx(4 / 3)
    assert found.edits == 2


def test_guidance_has_two_passes_a_step(bench: Any) -> None:
    tables, runs, methods = bench("step_tables"), bench("step_runs"), bench("step_methods")
    run = measured(runs, "a", 1.0, 0, [2.0, 0.5], [2, 0])
    [found] = tables.rows_of([run], [methods.Setting("a", 1.0, lambda pipe: None)])
    assert found.speed == pytest.approx(2 / 1.25)  # of the two steps of four passes that the uncached run had


def test_rows_are_over_the_same_edits(bench: Any, tmp_path: Path) -> None:
    runs, methods = bench("step_runs"), bench("step_methods")
    ledger = runs.Ledger(tmp_path / "ledger.jsonl")
    ledger.add([measured(runs, name, 1.0, edit, [1.0], [1]) for name, edit in (("a", 0), ("b", 0), ("a", 1))])
    settings = [methods.Setting(name, 1.0, lambda pipe: None) for name in ("a", "b")]
    again = runs.Ledger(tmp_path / "ledger.jsonl")
    assert {one.edit for one in again.complete(settings)} == {0}
    assert [one.method for one in again.missing(settings, 1)] == ["b"]


def test_knobs_follow_the_number_of_steps(bench: Any) -> None:
    methods = bench("step_methods")

    def knobs(steps: int, method: str) -> list[float]:
        every = methods.all_settings(steps, False, dict, dict)
        return [one.knob for one in every if one.method == method]

    assert knobs(28, "diffusers SeaCache") == [2 * one for one in knobs(56, "diffusers SeaCache")]
    assert knobs(28, "error gate, output_linear")[0] == pytest.approx(4 * knobs(56, "error gate, output_linear")[0])
    assert knobs(28, "tuned") == [1.5, 2.0, 2.5]
    for published in (0.2, 0.4, 0.6, 0.8):
        assert published in knobs(28, methods.SPEC)


def test_a_comparison_from_end_to_end(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_cache = bench("step_cache")
    words = ["--cells", "8:1:1", "--out", str(tmp_path), "--only", "even schedule", "SeaCache"]
    [cell] = step_cache.main(words)
    schedules = [one for one in cell["rows"] if one["method"].startswith("even")]
    assert [one["passes"] for one in schedules] == [pytest.approx(8 / 5), 2, pytest.approx(8 / 3)]
    assert all(one["psnr_mean"] > 30 and 0 < one["flip_mean"] < 0.2 for one in schedules)
    assert any(one["passes"] > 1 for one in cell["rows"] if one["method"] == "diffusers SeaCache")
    assert json.loads((tmp_path / "step_cache.json").read_text())["cells"] == [cell]
    assert (tmp_path / "step_cache-8-steps-guidance-1.png").stat().st_size > 10_000
    assert step_cache.main([*words, "--minutes", "0"]) == [cell]  # nothing is measured twice
    assert "PSNR at the same speed" in capsys.readouterr().out


def test_peers_are_left_as_they_were_found(bench: Any) -> None:
    """Each peer skips within its `with`, and the next run is the stock one again, bit for bit."""
    step_peers, runs = bench("step_peers"), bench("step_runs")
    model = runs.Bench(8, 1.0)
    stock = model.make(0)
    for name, (peer, knobs) in step_peers.peers(8, False).items():
        with peer(model.pipe, knobs[-1], 8):
            made = model.make(0)
        assert sum(made.step_passes) < 8, name
        assert model.make(0).picture.tobytes() == stock.picture.tobytes(), name


def test_overheads_are_shares_of_a_bare_step(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overhead = bench("step_overhead")
    monkeypatch.setattr(overhead, "BLOCKS", 2)
    found = overhead.main(["--tokens", "24", "--rounds", "1", "--out", str(tmp_path)])[24]
    assert found["bare_step_ms"] > 0
    for name, row_ in found["methods"].items():
        assert row_["skipped_share"] is not None, name
        if name.split(",")[0] in ("distance gate", "error gate", "schedule"):
            assert row_["computed_overhead"] is not None, name  # it computed every step
