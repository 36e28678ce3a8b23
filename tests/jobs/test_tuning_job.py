"""`dittocache calibrate` and `tune` as stages on a tiny checkpoint, with and without a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dittocache.config import RunConfig, check_config
from dittocache.events import EventLog, read_events
from dittocache.jobs.calibration import calibrate
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.reporting import report
from dittocache.jobs.run_folder import EVENTS_NAME, LORA_NAME, PROFILE_NAME, TUNING_NAME
from dittocache.jobs.tuning import tune
from dittocache.jobs.tuning_requests import edits_of, load_pipeline
from dittocache.sampling.generate import generate
from dittocache.teacache.profile import load_profile


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DITTOCACHE_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


def inputs_of(config: RunConfig, **overrides: Any) -> RunInputs:
    small = {
        "generate.num_inference_steps": 5,
        "calibrate.samples": 1,
        "calibrate.held_out_samples": 1,
        "tune.samples": 2,
        "tune.held_out_samples": 2,
        "tune.target": "speedup>=1.2",
    }
    chosen = check_config(config.model_dump(mode="json"), {**small, **overrides})
    return RunInputs(chosen, chosen.run_dir)


def log_of(inputs: RunInputs, stage: str) -> EventLog:
    return EventLog(inputs.run_dir / EVENTS_NAME, stage)


def result_of(inputs: RunInputs) -> dict[str, Any]:
    return [event for event in read_events(inputs.run_dir / EVENTS_NAME) if event["kind"] == "result"][-1]


def test_calibrate_then_tune_then_generate(config: RunConfig, folder: Path) -> None:
    inputs = inputs_of(config)
    calibrate(inputs, log_of(inputs, "calibrate"))
    profile = load_profile(inputs.run_dir / PROFILE_NAME)
    assert profile.settings is None and set(profile.calibration) == {"residual", "output"}
    assert (profile.run.steps, profile.run.branches) == (5, 1)
    points = json.loads((inputs.run_dir / "calibration" / "points.json").read_text())
    assert len(points["fitted"]) == len(points["held_out"]) == 3  # five steps without the first and the last
    assert (inputs.run_dir / "calibration" / "calibration.png").is_file()

    log_of(inputs, "tune").emit("stage_started", pid=0, command=["test"])
    tune(inputs, log_of(inputs, "tune"))
    tuned = load_profile(inputs.run_dir / PROFILE_NAME)
    assert tuned.calibration == profile.calibration  # not measured again
    assert tuned.settings is not None
    assert [path.name for path in folder.iterdir()] == [tuned.file_name]  # of the same model and runs
    assert result_of(inputs)["curve"] and result_of(inputs)["words"]
    report(inputs, log_of(inputs, "report"))
    told = json.loads((inputs.run_dir / "report.json").read_text())["tuning"]
    measured = json.loads((inputs.run_dir / TUNING_NAME).read_text())
    assert told["words"] == measured["words"] and len(told["points"]) == len(measured["curve"]) > 2
    assert sum(point["plain"] for point in told["points"]) > 0
    assert sum(point["chosen"] for point in told["points"]) == 1
    written = yaml.safe_load((inputs.run_dir / "teacache.yaml").read_text())
    kept = {"reference_kv": measured["reference_kv"]} if "reference_kv" in measured else {}
    assert written in ({"teacache": tuned.settings, **kept}, {"generate": {"num_inference_steps": 4}})

    found = check_config(config.model_dump(mode="json"), {"teacache": {"profile": "auto"}, **kept})
    sized = inputs.config.generate
    pipe = load_pipeline(inputs)
    edit = edits_of(inputs)[1][0]
    picture = generate(pipe, edit.images, edit.prompt, sized, inputs.sizes, found.teacache, found.reference_kv)
    assert picture.trace.passes < 5
    assert not any("profile was made" in note for note in picture.trace.notes)

    progress = [event for event in read_events(inputs.run_dir / EVENTS_NAME) if event["kind"] == "progress"]
    assert progress and all(event["eta"] >= 0 for event in progress)


def test_few_steps_leave_plain_steps_alone_to_try(config: RunConfig) -> None:
    inputs = inputs_of(config, **{"generate.num_inference_steps": 3, "tune.target": "speedup>=1.4"})
    tune(inputs, log_of(inputs, "tune"))
    assert "Fewer plain steps beat every cache here" in result_of(inputs)["words"]
    assert load_profile(inputs.run_dir / PROFILE_NAME).settings is None
    assert yaml.safe_load((inputs.run_dir / "teacache.yaml").read_text()) == {"generate": {"num_inference_steps": 2}}


def test_one_prompt_serves_with_other_noise(config: RunConfig) -> None:
    picture = str(next((Path(config.data.path) / "control_images").glob("*.png")))
    inputs = inputs_of(config, **{"generate.prompt": "make it red", "generate.image": [picture]})
    searched, verified = edits_of(inputs)
    assert searched == verified and [edit.prompt for edit in searched] == ["make it red"]
    calibrate(inputs, log_of(inputs, "calibrate"))
    assert "R²" in result_of(inputs)["words"]


def test_without_a_held_out_set_the_samples_are_divided(config: RunConfig) -> None:
    searched, verified = edits_of(inputs_of(config, held_out=None))
    assert len(searched) == len(verified) == 2
    assert not {edit.name for edit in searched} & {edit.name for edit in verified}


def test_a_profile_belongs_to_its_lora(config: RunConfig, folder: Path) -> None:
    inputs = inputs_of(config)
    calibrate(inputs, log_of(inputs, "calibrate"))
    pipe = load_pipeline(inputs)
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(inputs.run_dir / LORA_NAME, transformer_lora_layers=layers)
    calibrate(inputs, log_of(inputs, "calibrate"))
    assert len(load_profile(inputs.run_dir / PROFILE_NAME).model.lora) == 1
    assert len(list(folder.iterdir())) == 2
