"""The GPU benchmarks with tiny sizes on the CPU: the same code as with the real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import caching, step_cache, training, training_row
from benchmarks.gpu.random_models import empty_component, fill, make_checkpoint
from benchmarks.gpu.training_row import Row, cache_samples, train_row
from benchmarks.gpu.workplace import Results, Workplace, make_workplace, ran_out_of_memory

from dittocache.errors import CacheError
from dittocache.families.loading import model_index
from dittocache.families.registry import FAMILIES

# Of the published checkpoints, in thousand millions; the vocabulary that T5 holds twice before it is tied included.
REAL_BILLIONS = {
    "QwenImageTransformer2DModel": 20.43,
    "Qwen2_5_VLForConditionalGeneration": 8.29,
    "AutoencoderKLQwenImage": 0.127,
    "FluxTransformer2DModel": 11.90,
    "T5EncoderModel": 4.89,
    "CLIPTextModel": 0.123,
    "AutoencoderKL": 0.084,
}


def in_this_process(
    place: Workplace, row: Row | None, device: str, memory: float | None, left: float
) -> dict[str, Any]:
    return cache_samples(place, device) if row is None else train_row(place, row, device)


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return make_workplace(tmp_path / "work", "qwen-image-edit-plus", tiny=True, resolution=None, samples=2)


@pytest.mark.parametrize("family", ["qwen-image-edit-plus", "flux"])
def test_real_sizes_are_those_of_the_published_checkpoints(family: str, tmp_path: Path) -> None:
    from accelerate import init_empty_weights

    folder = make_checkpoint(tmp_path / "model", family, tiny=False)
    built = 0
    for name, entry in model_index(folder).items():
        if isinstance(entry, list | tuple) and entry[1] in REAL_BILLIONS:
            with init_empty_weights(include_buffers=False):
                component = empty_component(folder / name, entry)
            billions = sum(parameter.numel() for parameter in component.parameters()) / 1e9
            assert billions == pytest.approx(REAL_BILLIONS[entry[1]], rel=0.006), entry[1]
            built += 1
    assert built == (3 if family.startswith("qwen") else 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_and_trains_with_random_weights(family: str, tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work", family, tiny=True, resolution=None, samples=2)
    assert cache_samples(place, "cpu")["samples"] == 2
    cached = train_row(place, Row("cached", steps=2), "cpu")
    live = train_row(place, Row("live", steps=2), "cpu")
    assert cached["losses"] == live["losses"]
    assert live["embeddings_identical"]
    assert 0.1 < cached["losses"][0] < 100  # of unit gain: neither dead nor exploding
    assert cached["memory_plan"]["notes"] == []


def test_rows_are_measured_once_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--samples", "2", "--steps", "3", "--results", str(tmp_path)]
    first = training.main([*words, "--rows", "cached", "live"], in_this_process)
    content = json.loads(first.path.read_text())
    assert content["summary"][0]["losses_identical"]
    assert content["machine"]["versions"]
    assert [one["row"]["way"] for one in content["rows"]] == ["cached", "live"]
    assert "identical: all losses, embeddings" in capsys.readouterr().out

    measured: list[str] = []

    def noted(place: Workplace, row: Row | None, *rest: Any) -> dict[str, Any]:
        measured.append("caching" if row is None else row.way)
        return in_this_process(place, row, *rest)

    again = training.main([*words, "--rows", "cached", "mixed:batch=2,deterministic=1", "live"], noted)
    assert measured == ["caching", "mixed"]
    assert again.rows[:2] == content["rows"]
    assert again.rows[2]["row"]["deterministic"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_memory_that_runs_out_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*arguments: Any, **options: Any) -> Iterator[Any]:
        states = original(*arguments, **options)
        yield next(states)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    original = training_row.train_lora
    monkeypatch.setattr(training_row, "train_lora", short)
    words = ["--tiny", "--samples", "2", "--steps", "3", "--results", str(tmp_path), "--rows", "cached", "live"]
    results = training.main(words, in_this_process)
    assert [one["out_of_memory"] for one in results.rows] == ["step 2", "step 2"]
    assert "out of memory: step 2" in capsys.readouterr().out


def test_other_errors_are_no_rows(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_samples(place, "cpu")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(training_row, "load_frozen", broken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        train_row(place, Row("cached"), "cpu")


def test_memory_that_ran_out_below_counts_too() -> None:
    error = CacheError("memory ran out while vae encoded sample 'a' alone")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert ran_out_of_memory(error)
    assert not ran_out_of_memory(CacheError("the plan was made for another model"))


def test_a_process_of_its_own_answers(place: Workplace) -> None:
    found = training.in_a_process(place, None, "cpu", None, left=60)
    assert found["samples"] == 2
    assert found["seconds"] > 0
    assert (place.folder / training_row.MANIFEST).is_file()


def test_a_process_that_fails_is_a_row(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.sys, "executable", shutil.which("false"))
    assert training.in_a_process(place, None, "cpu", None, left=60)["failed"] == "the process ended with 1"


def test_what_failed_is_in_the_table(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", {}, fresh=True)
    results.put("caching", {"seconds": 1.0, "samples": 2, "peak_bytes": 1})
    results.add(asdict(Row("live")), {"failed": "no time left"})
    assert "no time left" in training.table(results)


def test_rows_in_words() -> None:
    assert training.parse_row("live:batch=4,base=fp8,checkpointing=0", 8) == Row("live", 4, "fp8", False, steps=8)
    for wrong in ("lively", "live:size=3", "live:base=nf4"):
        with pytest.raises(SystemExit, match="--rows"):
            training.parse_row(wrong, 8)
    assert all(training.parse_row(text, 8) for text in training.ROWS)


def test_time_that_is_over_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--samples", "2", "--minutes", "0", "--results", str(tmp_path), "--rows", "cached"]
    results = training.main(words, in_this_process)
    assert results.rows == []
    assert "no time left for: cached" in capsys.readouterr().err


def test_encoders_are_measured_in_all_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--samples", "3", "--batches", "2", "--num-workers", "0", "--results", str(tmp_path)]
    results = caching.main(words)
    assert len(results.rows) == 4  # two encoders, two ways of batching
    for one in results.rows:
        assert one["alone"] > 0 and one["in_line"] > 0 and one["cached"] > 0
        assert one["bytes_stored"] > 0
    capsys.readouterr()
    assert caching.main(words).rows == results.rows  # nothing is measured twice
    assert "text_encoder, together, batch 2" in capsys.readouterr().out


def test_an_encoder_that_runs_out_of_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(caching.EncoderSession, "encode", short)
    words = ["--tiny", "--samples", "2", "--batches", "1", "--num-workers", "0", "--results", str(tmp_path)]
    [first, *_] = caching.main(words).rows
    assert first["alone"] > 0
    assert "cached" not in first
    assert "out of memory" in first["out_of_memory"]


@pytest.mark.parametrize("family", ["qwen-image", "qwen-image-edit-plus", "flux"])
def test_fixed_schedules_skip_what_they_say(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--family", family, "--steps", "8", "--guidance", "1", "--repeats", "1"]
    results = step_cache.main([*words, "--results", str(tmp_path)])
    for one in results.rows:
        assert one["ideal"] == pytest.approx(8 / one["row"]["computed"])
        skips = one["row"]["computed"] < 8
        assert (one["skipped_step"] is not None) == skips
        if skips:  # two outputs of 16 noise tokens and 64 channels, float32
            assert one["bytes_held"] == 2 * 16 * 64 * 4
    assert [one["row"]["gate"] for one in results.rows[:3]] == ["distance", "error", "schedule"]
    capsys.readouterr()
    assert step_cache.main([*words, "--results", str(tmp_path)]).rows == results.rows  # nothing is measured twice
    assert "schedule, 4 of 8 steps computed, guidance 1" in capsys.readouterr().out


def test_guidance_needs_no_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cache, "SHARES", (2,))
    words = ["--tiny", "--steps", "4", "--guidance", "4", "--repeats", "1", "--results", str(tmp_path)]
    rows = step_cache.main(words).rows
    assert [one["row"]["computed"] for one in rows] == [4, 4, 3]


def test_weights_are_cut_from_the_pool_round_and_round() -> None:
    values = torch.empty(7)
    fill(values, torch.tensor([1.0, 2.0, 3.0]), start=2, gain=2.0)
    assert values.tolist() == [6, 2, 4, 6, 2, 4, 6]
