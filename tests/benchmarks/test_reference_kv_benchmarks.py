"""The benchmarks of the reference KV cache, with small sizes: what is counted, saved and resumed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import reference_kv as gpu
from benchmarks.reference_kv import Case, parse_case

from benchmarks import reference_kv, reference_kv_quality
from dittocache.demo.edits import evaluation_edits


def test_theory_is_the_share_of_reference_tokens() -> None:
    case = Case(noise=4096, reference=4096, text=0, width=3072)
    assert case.saving(computed=0, steps=1) == pytest.approx(0.5)
    assert case.saving(computed=1, steps=4) == pytest.approx(0.375)
    assert case.saving(computed=8, steps=8) == 0
    assert case.saving(0, 1, isolated=True) < 0.5  # isolated references attend to fewer keys, so less is there to save
    assert case.saving_of_stock(0, 1) == case.saving(0, 1)
    assert case.saving_of_stock(1, 4) > case.saving(1, 4)  # computing them once is cheaper too
    assert Case(512, 1536, text=32).saving(0, 1) == pytest.approx(1536 / 2080)


def test_cases_in_words() -> None:
    assert parse_case("512+1024") == Case(512, 1024)
    for wrong in ("512", "a+b", "512+", "-1+2"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"NOISE\+REFERENCE"):
            parse_case(wrong)


def test_steps_and_runs_are_measured_beside_theory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cases", "32+64", "--steps", "2", "8", "--pairs", "1", "--results", str(tmp_path)]
    reference_kv.main(words)
    report: dict[str, Any] = json.loads((tmp_path / "reference_kv.json").read_text())
    assert [row["isolated"] for row in report["rows"]] == [False, True]
    for row in report["rows"]:
        case = Case(32, 64)
        assert row["step"]["theory"] == case.saving(0, 1, row["isolated"])
        computed = [1, 1, 1, 1] if row["isolated"] else [1, 2, 1, 3]  # the default: steps 0 and 1; 0, 2 and 5
        assert [one["computed"] for one in row["runs"]] == computed
        theory = [case.saving(*both, row["isolated"]) for both in zip(computed, (2, 2, 8, 8), strict=True)]
        if row["isolated"]:  # every other run is compared with the stock model
            theory[1::2] = [case.saving_of_stock(1, steps) for steps in (2, 8)]
        assert [one["theory"] for one in row["runs"]] == theory
        assert row["step"]["saving"] < 1
    assert "32+64, isolated" in capsys.readouterr().out


def test_quality_is_measured_edit_by_edit_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = reference_kv_quality.settings

    def some(steps: int) -> list[reference_kv_quality.Setting]:
        return [one for one in every(steps) if one.name in ("2 plain steps", "step 0 only", "every 2")]

    monkeypatch.setattr(reference_kv_quality, "settings", some)
    words = ["--edits", "1", "--steps", "4", "--kinds", "zero", "--results", str(tmp_path)]
    report = reference_kv_quality.main(words)
    rows = {row["setting"]: row for row in report["cases"]["zero, 4 steps"]["rows"]}
    assert (rows["step 0 only"]["full"], rows["step 0 only"]["reused"]) == (1, 3)
    assert (rows["every 2"]["full"], rows["every 2"]["reused"]) == (2, 2)
    assert rows["every 2"]["psnr"] > rows["step 0 only"]["psnr"]
    assert rows["every 2"]["flip"] < rows["step 0 only"]["flip"]
    real = reference_kv_quality.REAL
    assert rows["step 0 only"]["saving_1024"] == pytest.approx(real.saving(1, 4))
    assert rows["2 plain steps"]["saving_1024"] == pytest.approx(1 / 2)

    monkeypatch.setattr(reference_kv_quality.Runs, "measure", None)  # nothing is measured twice
    assert reference_kv_quality.main(words)["cases"] == report["cases"]
    assert "step 0 only" in capsys.readouterr().out


def test_settings_differ_with_the_number_of_steps() -> None:
    names = {steps: [one.name for one in reference_kv_quality.settings(steps)] for steps in (4, 8, 28)}
    assert all(len(set(found)) == len(found) for found in names.values())
    assert "TeaCache" in names[28] and "TeaCache" not in names[8]
    assert "every 4" in names[28] and "every 3" not in names[4]


def test_every_edit_has_its_own_prompt_and_picture() -> None:
    runs = reference_kv_quality.Runs("zero", evaluation_edits(2))
    plain = reference_kv_quality.Setting("plain")
    pictures = [runs.run(number, 2, plain)[0].tobytes() for number in (0, 1, 0)]
    assert pictures[0] == pictures[2] != pictures[1]


def test_live_t_is_the_2509_kind() -> None:
    runs = reference_kv_quality.Runs("live", evaluation_edits(1))
    assert not any(part.zero_cond_t for part in (runs.pipe.transformer, *runs.pipe.transformer.transformer_blocks))


def test_the_gpu_benchmark_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--references", "2", "--steps", "4", "--results", str(tmp_path)]
    results = gpu.main(words)
    by_way = {one["row"]["way"]: one for one in results.rows}
    case = Case(noise=16, reference=32, text=8, width=by_way["once"]["width"])
    assert by_way["once"]["computed"] == 1
    assert by_way["usual"]["computed"] == 2  # at 4 steps
    assert by_way["once"]["theory"] == pytest.approx(case.saving(1, 4))
    assert by_way["exact"]["theory"] > by_way["once"]["theory"]
    assert by_way["once"]["bytes_held"] > 0
    assert by_way["once"]["peak_bytes"] is None
    capsys.readouterr()
    assert gpu.main(words).rows == results.rows  # nothing is measured twice
    assert "2 reference(s), 4 steps, exact" in capsys.readouterr().out


def test_memory_that_runs_out_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> Any:
        raise gpu.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(gpu.Calls, "run", short)
    words = ["--tiny", "--references", "1", "--steps", "2", "--ways", "once", "--results", str(tmp_path)]
    assert gpu.main(words).rows[0]["out_of_memory"] == "the stock run"
