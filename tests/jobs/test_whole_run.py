"""The main job from the data set to the report, stage by stage, on a tiny checkpoint of the real classes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dittocache.config import RunConfig, check_config, save_config
from dittocache.errors import CacheError, ConfigError, ModelError
from dittocache.events import Event, EventLog, read_events
from dittocache.jobs import generation, measurement
from dittocache.jobs.caching import cache_latents, cache_text
from dittocache.jobs.generation import chosen_edits, generate_edits, steps_of_equal_cost
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.lora_training import train
from dittocache.jobs.measurement import measure
from dittocache.jobs.reporting import Findings, report
from dittocache.jobs.stage import run_stage
from dittocache.jobs.validation import validate
from dittocache.training.lora import SETTINGS_KEY

STAGES = {
    "validate": validate,
    "cache_latents": cache_latents,
    "cache_text": cache_text,
    "train": train,
    "measure": measure,
    "generate": generate_edits,
    "report": report,
}


def carry_out(config: RunConfig, *stages: str, listener: Any = None) -> dict[str, dict[str, Any]]:
    """Run stages in this process; return the merged results of each."""
    found: dict[str, dict[str, Any]] = {}

    def hear(event: Event) -> None:
        if event["kind"] == "result":
            found.setdefault(event["stage"], {}).update(event)
        if listener is not None:
            listener(event)

    for stage in stages:
        log = EventLog(config.run_dir / "events.jsonl", stage, hear)
        log.emit("stage_started", pid=os.getpid(), command=["test"])
        STAGES[stage](RunInputs(config, config.run_dir), log)
        log.emit("stage_finished", seconds=0.0)
    return found


def test_from_data_set_to_report(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "MEASURED_STEPS", 2)
    found = carry_out(config, *STAGES)
    assert found["cache_latents"]["encoded"] == 9
    assert found["cache_text"]["encoded"] == 16
    assert found["train"]["steps"] == 3
    assert found["measure"]["cached"]["seconds_per_step"] > 0
    assert found["measure"]["live"]["seconds_per_step"] > 0

    generated = found["generate"]
    assert [row["name"] for row in generated["edits"]] == ["edit-0", "edit-1"]
    assert "base_psnr" in generated
    variants = generated["compared"][0]["variants"]
    assert [variant["role"] for variant in variants] == ["uncached", "cached", "cached", "cached", "fewer_steps"]
    by_label = {variant["label"]: variant["patterns"] for variant in variants}
    assert by_label["Uncached"] == {"cond": ["computed"] * 4}
    assert by_label["TeaCache"] == {"cond": ["computed", "skipped", "skipped", "computed"]}
    assert by_label["Reference KV"] == {"cond": ["refreshed", "kept", "refreshed", "kept"]}

    page = (config.run_dir / "report.html").read_text()
    for words in ("What was cached", "Loss curve", "Before and after", "Caches compared", "TeaCache"):
        assert words in page
    findings = Findings.gathered(read_events(config.run_dir / "events.jsonl"))
    assert sorted(findings.losses) == [1, 2, 3]


def test_a_second_run_encodes_nothing_and_a_new_caption_only_its_own(config: RunConfig) -> None:
    carry_out(config, "validate", "cache_latents", "cache_text")
    again = carry_out(config, "validate", "cache_latents", "cache_text")
    assert again["validate"]["cached"] == {"cache_latents": 9, "cache_text": 16}
    assert again["cache_latents"]["encoded"] == again["cache_text"]["encoded"] == 0

    (config.data.path / "training_images" / "edit-2.txt").write_text("something else\n")
    third = carry_out(config, "validate", "cache_latents", "cache_text")
    assert third["validate"]["cached"] == {"cache_latents": 9}
    assert third["cache_text"]["encoded"] == 2  # the prompt's embeddings and their mask; the empty prompt's stay
    assert third["cache_text"]["reused"] == 14


def test_validation_alone_writes_the_manifest_where_everything_is_cached(config: RunConfig) -> None:
    carry_out(config, "validate", "cache_latents", "cache_text")
    (config.run_dir / "manifest.json").unlink()
    carry_out(config, "validate")
    assert (config.run_dir / "manifest.json").exists()


def test_a_sample_that_turned_bad_is_left_out_and_named(config: RunConfig) -> None:
    warnings: list[str] = []

    def listen(event: Event) -> None:
        if event["kind"] == "message" and event["level"] in ("warning", "error"):
            warnings.append(event["text"])

    # The header is whole, so validation passes; the pixels are cut off.
    picture = config.data.path / "training_images" / "edit-1.png"
    picture.write_bytes(picture.read_bytes()[:200])
    found = carry_out(config, "validate", "cache_latents", "cache_text", "train", listener=listen)
    assert len(found["cache_latents"]["failed"]) == 1
    assert any("edit-1.png" in text for text in warnings)
    assert any("1 of 4 samples are left out" in text for text in warnings)
    assert found["train"]["steps"] == 3


def test_nothing_to_train_on_is_an_error(config: RunConfig) -> None:
    for picture in (config.data.path / "training_images").glob("*.png"):
        picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(CacheError, match="none of the 4 samples could be cached"):
        carry_out(config, "validate", "cache_latents", "cache_text")


def test_training_without_cached_embeddings_says_so(config: RunConfig) -> None:
    with pytest.raises(CacheError, match="cache the data set first"):
        carry_out(config, "train")


def test_live_training_needs_no_cache_and_gives_the_same_lora(config: RunConfig) -> None:
    from safetensors.torch import load_file

    carry_out(config, "validate", "cache_latents", "cache_text", "train")
    live = check_config(config.model_dump(), {"cache.use_cache": False, "name": "live"})
    found = carry_out(live, "validate", "train")
    assert "plan" not in found["validate"]
    cached_lora, live_lora = (
        load_file(one.run_dir / "lora" / "pytorch_lora_weights.safetensors") for one in (config, live)
    )
    assert cached_lora.keys() == live_lora.keys()
    assert all(torch.equal(cached_lora[name], live_lora[name]) for name in cached_lora)


def test_a_record_lost_after_caching_is_encoded_live_and_said_once(config: RunConfig) -> None:
    carry_out(config, "validate", "cache_latents", "cache_text")
    records = sorted((config.cache.cache_dir / "objects").rglob("*.safetensors"))
    for record in records[:3]:
        record.unlink()
    warnings: list[str] = []

    def listen(event: Event) -> None:
        if event["kind"] == "message" and event["level"] == "warning":
            warnings.append(event["text"])

    assert carry_out(config, "train", listener=listen)["train"]["steps"] == 3
    assert len(warnings) == 1
    assert "is not in the cache" in warnings[0]


def test_a_stopped_training_goes_on_and_a_finished_one_starts_anew(config: RunConfig) -> None:
    def stop_after_first(event: Event) -> None:
        if event["kind"] == "metric" and event["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    carry_out(config, "validate", "cache_latents", "cache_text")
    with pytest.raises(KeyboardInterrupt):
        carry_out(config, "train", listener=stop_after_first)
    assert not (config.run_dir / "lora").exists()

    steps: list[int] = []

    def note(event: Event) -> None:
        if event["kind"] == "metric":
            steps.append(event["step"])

    carry_out(config, "train", listener=note)
    assert steps[-1] == 3
    assert steps[0] > 1
    steps.clear()
    carry_out(config, "train", listener=note)
    assert steps == [1, 2, 3]
    assert (config.run_dir / "previous" / "lora").is_dir()
    losses = Findings.gathered(read_events(config.run_dir / "events.jsonl")).losses
    assert sorted(losses) == [1, 2, 3]


def test_a_picture_of_ones_own(config: RunConfig, tmp_path: Path) -> None:
    picture = shutil.copy(config.data.path / "control_images" / "edit-0.png", tmp_path / "mine.png")
    own = check_config(
        config.model_dump(),
        {"generate.prompt": "make it red", "generate.image": [str(picture)], "teacache": None, "reference_kv": None},
    )
    found = carry_out(own, "generate")["generate"]
    [row] = found["edits"]
    assert row["caption"] == "make it red"
    assert (own.run_dir / row["base"]).is_file()
    assert "lora" not in row
    assert "compared" not in found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"generate.image": ["x.png"]}, "generate.image is given without generate.prompt"),
        ({"generate.prompt": "make it red"}, "generate.prompt is given without generate.image"),
    ],
)
def test_words_and_pictures_belong_together(config: RunConfig, overrides: dict[str, Any], message: str) -> None:
    own = check_config(config.model_dump(), overrides)
    with pytest.raises(ConfigError, match=message):
        chosen_edits(RunInputs(own, own.run_dir))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("flux", r"lora is of a flux, the run's model is a qwen-image-edit-plus; set model\.path"),
        (None, "cannot be read"),
    ],
)
def test_a_lora_that_does_not_fit_is_told_before_anything_is_loaded(
    config: RunConfig, family: str | None, message: str
) -> None:
    folder = config.run_dir / "lora"
    folder.mkdir(parents=True)
    file = folder / "pytorch_lora_weights.safetensors"
    file.write_text("broken")
    if family is not None:
        save_file({"a": torch.zeros(1)}, file, metadata={SETTINGS_KEY: json.dumps({"family": family})})
    with pytest.raises(ModelError, match=message):
        generate_edits(RunInputs(config, config.run_dir), EventLog(config.run_dir / "events.jsonl", "generate"))


def test_without_a_held_out_set_samples_of_the_data_set_are_edited(config: RunConfig) -> None:
    own = check_config(config.model_dump(), {"held_out": None})
    edits = chosen_edits(RunInputs(own, own.run_dir))
    assert len(edits) == generation.SHOWN_OF_DATA


@pytest.mark.parametrize(("cached", "steps"), [(12.0, 10), (30.0, 28), (40.0, 28), (0.01, 1)])
def test_the_baseline_takes_as_long_as_the_cache(cached: float, steps: int) -> None:
    fixed, a_step = 2.0, 1.0  # seconds
    assert steps_of_equal_cost(28, fixed + 28 * a_step, fixed + 14 * a_step, cached) == steps


def test_the_baseline_where_steps_cost_no_measurable_time_is_half_of_them() -> None:
    assert steps_of_equal_cost(28, 1.0, 1.01, 0.5) == 14


def test_the_stage_process_turns_errors_into_codes_and_events(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_config(config, config.run_dir / "config.yaml")

    def last() -> Event:
        return list(read_events(config.run_dir / "events.jsonl"))[-1]

    assert run_stage("train", config.run_dir) == 1  # nothing cached: a CacheError
    assert last()["kind"] == "stage_failed"
    assert "cache the data set first" in last()["error"]

    shutil.rmtree(config.data.path)
    assert run_stage("validate", config.run_dir) == 2
    assert "is not a folder" in last()["error"]

    def broken(inputs: RunInputs, log: EventLog) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("dittocache.jobs.validation.validate", broken)
    assert run_stage("validate", config.run_dir) == 1
    assert last()["error"] == "RuntimeError: CUDA out of memory"
    assert "memory ran out" in last()["hint"]
    assert "Traceback" in capsys.readouterr().err

    def stopped(inputs: RunInputs, log: EventLog) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dittocache.jobs.validation.validate", stopped)
    assert run_stage("validate", config.run_dir) == 130
    assert last()["stopped"]
