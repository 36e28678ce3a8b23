"""Everything is checked before anything heavy, and every problem is listed at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dittocache.config import RunConfig, check_config
from dittocache.demo.tiny import save_tiny
from dittocache.errors import ConfigError
from dittocache.events import EventLog, read_events
from dittocache.jobs import inputs as run_inputs
from dittocache.jobs import validation
from dittocache.jobs.inputs import RunInputs, resolve_device
from dittocache.jobs.validation import folder_problems, model_problems, validate


def changed(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    return check_config(config.model_dump(), overrides)


def problems_of(config: RunConfig) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        validate(RunInputs(config, config.run_dir), EventLog(config.run_dir / "events.jsonl", "validate"))
    return caught.value.problems


def test_a_sound_run_says_what_it_will_encode(config: RunConfig) -> None:
    log = EventLog(config.run_dir / "events.jsonl", "validate")
    validate(RunInputs(config, config.run_dir), log)
    results: dict[str, Any] = {}
    for event in read_events(log.path):
        results |= event
    assert (results["samples"], results["held_out"], results["family"]) == (4, 2, "qwen-image-edit-plus")
    assert results["cached"] == {}
    assert results["plan"]["misses"] == 25
    assert results["artifacts"]["image_latents"] == {"encoder": "vae", "records": 4, "missing": 4}
    assert not (config.run_dir / "manifest.json").exists()


def test_training_needs_a_data_set_though_a_picture_needs_none(config: RunConfig) -> None:
    content = config.model_dump() | {"data": {"sets": []}, "held_out": None}
    assert problems_of(check_config(content)) == (
        "data.path: found no data set; give a folder of pictures and captions, or a table of them",
    )


def test_every_problem_is_listed_at_once_with_its_field(config: RunConfig, tmp_path: Path) -> None:
    (config.data.path / "training_images" / "edit-1.txt").unlink()
    (config.data.path / "control_images" / "edit-2.png").write_bytes(b"no picture")
    assert config.held_out is not None
    (config.held_out / "training_images" / "edit-0.txt").write_text("")
    broken = tmp_path / "broken"
    shutil.copytree(config.model.path, broken)
    shutil.rmtree(broken / "vae")
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "file").write_text("")
    found = problems_of(
        changed(
            config,
            {
                "model.path": str(broken),
                "model.device": "cuda:7",
                "cache.cache_dir": str(tmp_path / "file"),
                "cache.devices": {"vae": "gpu"},
                "generate.image": [str(tmp_path / "none.png")],
                "generate.prompt": "x",
            },
        )
    )
    text = "\n".join(found)
    assert "model.device: 'cuda:7' is not there" in text
    assert "cache.devices.vae: found 'gpu'" in text
    assert "lists the component 'vae', but its folder is missing" in text
    assert "transformer holds no weights" in text
    assert "data.path: " in text
    assert "edit-1.png: no caption" in text
    assert "edit-2.png" in text
    assert "held_out: " in text
    assert "edit-0.txt: the caption is empty" in text
    assert f"cache.cache_dir: {tmp_path / 'file'} is a file" in text
    assert "generate.image.0: there is no file" in text
    assert len(found) == 9


def test_a_missing_model_and_an_unknown_family_are_told_with_the_rest(config: RunConfig, tmp_path: Path) -> None:
    found = problems_of(
        changed(
            config, {"model.path": str(tmp_path / "nowhere"), "cache.cache_dir": "/proc/none", "model.family": "qwn"}
        )
    )
    text = "\n".join(found)
    assert "no model family 'qwn'" in text
    assert "nowhere" in text
    assert "cache.cache_dir: " in text


def test_a_set_without_controls_is_no_set_for_an_edit_family(config: RunConfig) -> None:
    shutil.rmtree(config.data.path / "control_images")
    [problem] = problems_of(config)
    assert problem.startswith("data.path: sample 'edit-0' has no control picture; ")
    assert problem.endswith("; the same holds for all 4 samples")


def test_samples_of_which_the_same_is_to_be_said_share_a_line(config: RunConfig) -> None:
    model = save_tiny(config.output_dir / "kontext", "flux-kontext")
    for name in ("edit-1", "edit-3"):
        shutil.copy(
            config.data.path / "control_images" / f"{name}.png",
            config.data.path / "control_images" / f"{name}_control_1.png",
        )
    [problem] = problems_of(changed(config, {"model.path": str(model), "model.family": None}))
    assert problem.startswith("data.path: sample 'edit-1' has 2 control pictures; ")
    assert problem.endswith("; the same holds for 1 more: 'edit-3'")


def test_the_bundled_model_at_a_real_size_is_refused(config: RunConfig) -> None:
    found = problems_of(changed(config, {"model.path": "bundled", "data.resolution": 1024}))
    assert any("data.resolution: found 1024" in problem for problem in found)


def test_too_little_disk_for_the_missing_records(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "needed_bytes", lambda plan: 10**18)
    with pytest.raises(ConfigError, match=r"cache\.cache_dir: about 1000000000\.0 GB are needed"):
        validate(RunInputs(config, config.run_dir), EventLog(config.run_dir / "events.jsonl", "validate"))


def test_the_first_run_is_told_what_its_records_will_take(config: RunConfig) -> None:
    plan = RunInputs(config, config.run_dir).plan()
    assert plan.hits == 0 and plan.bytes_to_write is not None
    assert validation.needed_bytes(plan) == plan.bytes_to_write.total > 10_000


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert folder_problems("f", tmp_path / "not" / "there" / "yet") == []
    assert "is a file" in folder_problems("f", tmp_path / "file")[0]
    assert "is a file" in folder_problems("f", tmp_path / "file" / "below")[0]
    assert not (tmp_path / "not").exists()  # checking makes nothing
    monkeypatch.setattr(validation, "FREE_BYTES", 10**18)
    assert "are free on the disk" in folder_problems("f", tmp_path)[0]

    def denied(dir: Path) -> None:  # noqa: A002
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(validation.tempfile, "TemporaryFile", denied)
    assert folder_problems("cache.cache_dir", tmp_path) == [
        f"cache.cache_dir: {tmp_path} cannot be written (Permission denied)"
    ]


def test_a_whole_checkpoint_has_no_problems(tiny_model: Path) -> None:
    assert model_problems(str(tiny_model)) == []


def test_a_component_that_is_a_folder_of_text_or_cut_short_is_told_by_file(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    shutil.rmtree(broken / "vae")
    (broken / "vae").mkdir()
    (broken / "vae" / "notes.txt").write_text("the VAE goes here")
    (broken / "transformer" / "config.json").write_text("not JSON")
    weights = broken / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = {
        problem.split(f"{broken}/")[1].split("/")[0].split()[0]: problem for problem in model_problems(str(broken))
    }
    assert found.keys() == {"transformer", "text_encoder", "vae"}
    assert "config.json cannot be read" in found["transformer"]
    assert "holds notes.txt and no config.json" in found["vae"]
    assert "model.safetensors cannot be read" in found["text_encoder"]
    assert "cut short: download it again" in found["text_encoder"]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu", "model.device") == "cpu"
    monkeypatch.setattr(run_inputs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run_inputs.torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", "model.device") == "cuda"
    assert resolve_device("cuda:1", "model.device") == "cuda:1"
    with pytest.raises(ConfigError, match=r"model\.device: 'cuda:2' is not there; this machine has 2"):
        resolve_device("cuda:2", "model.device")


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "live"])
def test_what_does_not_count_in_a_list_of_sets_is_told_once(config: RunConfig, tmp_path: Path, use_cache: bool) -> None:
    sets = tmp_path / "sets.toml"
    sets.write_text(
        f"[[datasets]]\nimage_directory = '{config.data.path}/training_images'\n"
        f"control_directory = '{config.data.path}/control_images'\nenable_bucket = true\nbatch_size = 8\n"
    )
    settings = {"data.path": str(sets), "cache.use_cache": use_cache}
    log = EventLog(config.run_dir / "events.jsonl", "validate")
    validate(RunInputs(changed(config, settings), config.run_dir), log)
    told = "\n".join(event.get("text", "") for event in read_events(log.path))
    assert told.count("batch_size = 8 does not count") == 1
