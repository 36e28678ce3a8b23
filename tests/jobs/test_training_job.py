"""The training stage: what it makes beside the LoRA, resumed, validated, in several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.jobs.test_whole_run import carry_out
from tests.training.processes import environment

from dittocache.config import RunConfig, check_config, save_config
from dittocache.errors import ConfigError
from dittocache.events import Event, EventLog
from dittocache.jobs import training_memory
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.lora_training import open_source
from dittocache.jobs.training_identity import run_identity
from dittocache.training.accelerator import make_accelerator
from dittocache.training.checkpoint import checkpoints
from dittocache.training.loop import train_lora
from dittocache.training.lora import WEIGHT_NAME, add_lora, read_settings
from dittocache.training.sources import MixedSource

CACHED = ("validate", "cache_latents", "cache_text")
pytestmark = pytest.mark.usefixtures("encoded")


def _with(config: RunConfig, **settings: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def _data(config: RunConfig) -> Path:
    assert config.data.path is not None
    return config.data.path


def _lora(config: RunConfig, name: str = "lora") -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(config.run_dir / name / WEIGHT_NAME)
    return weights


def test_the_memory_plan_is_told_before_anything_is_loaded(config: RunConfig) -> None:
    events: list[Event] = []
    carry_out(config, *CACHED, "train", listener=events.append)
    kinds = [
        next((name for name in ("memory_plan", "loss", "text") if name in event), "")
        for event in events
        if event["stage"] == "train"
    ]
    assert kinds.index("memory_plan") < kinds.index("loss")
    plan = next(event["memory_plan"] for event in events if "memory_plan" in event)
    model = Path(config.model.path) / "transformer"
    assert plan["weights"] == sum(
        tensor.nbytes for file in model.glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert plan["lora"] == sum(tensor.nbytes for tensor in _lora(config).values())
    assert any("memory for training about" in event.get("text", "") for event in events)


def test_memory_that_is_not_there_is_told(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []

    def listen(event: Event) -> None:
        if event["kind"] == "message" and event["level"] == "warning":
            warnings.append(event["text"])

    monkeypatch.setattr(training_memory, "free_machine_bytes", lambda: 1_000_000)
    carry_out(config, *CACHED, "train", listener=listen)
    assert [text for text in warnings if "memory" in text] == [
        "only 1.0 MB are free on cpu, so memory will run out: lower train.batch_size or data.resolution, or set "
        "train.gradient_checkpointing, train.base_quantization or train.offload"
    ]


def test_the_average_is_the_lora_to_use_and_the_raw_weights_lie_beside_it(config: RunConfig) -> None:
    averaged = _with(config, ema_decay=0.5, keep_checkpoints=1, steps=4, learning_rate=1e-2)
    carry_out(averaged, *CACHED, "train")
    [last] = checkpoints(averaged.run_dir / "checkpoints")
    assert last.name == "step-00000004"
    raw = _lora(averaged, "lora-raw")
    plain = config.model_copy(update={"name": "plain"})
    plain = _with(plain, steps=4, learning_rate=1e-2)
    carry_out(plain, *CACHED, "train")
    assert all(torch.equal(raw[name], tensor) for name, tensor in _lora(plain).items())
    assert not all(torch.equal(raw[name], tensor) for name, tensor in _lora(averaged).items())
    assert read_settings(averaged.run_dir / "lora")["ema_decay"] == 0.5
    assert not (plain.run_dir / "lora-raw").exists()


def test_pictures_are_made_on_the_way_and_change_nothing(config: RunConfig) -> None:
    events: list[Event] = []
    carry_out(config, *CACHED, "train")
    watched = _with(config.model_copy(update={"name": "watched"}), validate_every=2, validation_pictures=1)
    carry_out(watched, *CACHED, "train", listener=events.append)
    made = [event["validation"] for event in events if "validation" in event]
    assert [one["step"] for one in made] == [2]
    [row] = made[0]["pictures"]
    assert row["name"] == "edit-0"
    assert (watched.run_dir / row["picture"]).is_file()
    assert row["picture"].startswith("samples/step-2/")
    assert all(torch.equal(tensor, _lora(watched)[name]) for name, tensor in _lora(config).items())


def test_prompts_of_ones_own_are_pictured_on_the_data_sets_references(config: RunConfig) -> None:
    prompts = ["make it blue", "make it round", "one too many"]
    watched = _with(config, validate_every=3, validation_prompts=prompts)
    carry_out(watched, *CACHED, "train")
    names = sorted(path.name for path in (watched.run_dir / "samples" / "step-3").iterdir())
    assert names == ["prompt-1.png", "prompt-2.png"]


def test_another_model_is_no_continuation_and_other_captions_are_told(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out(config, *CACHED, "train")
    (config.run_dir / "checkpoints" / "finished").unlink()
    (_data(config) / "training_images" / "edit-2.txt").write_text("something else\n")
    warnings: list[str] = []

    def listen(event: Event) -> None:
        if event["kind"] == "message" and event["level"] == "warning":
            warnings.append(event["text"])

    carry_out(_with(config, steps=4), *CACHED, "train", listener=listen)
    assert len(warnings) == 1
    assert "data: the samples, their files, captions or repeats are not those" in warnings[0]
    assert "steps: the checkpoint has 3, this run has 4" in warnings[0]


def test_a_mask_picture_keeps_gradients_to_what_it_shows(config: RunConfig) -> None:
    for number in range(4):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 32, 64))
        mask.save(_data(config) / "training_images" / f"edit-{number}_mask.png")
    carry_out(config, *CACHED)
    inputs = RunInputs(config, config.run_dir)
    names, source = open_source(inputs, EventLog(config.run_dir / "events.jsonl", "train"))
    assert isinstance(source, MixedSource)
    transformer = inputs.family.load_pipeline(inputs.model, ["transformer"], inputs.dtype, "cpu").transformer
    add_lora(transformer, inputs.family, config.train)
    gradients: list[torch.Tensor] = []

    def watch(module: Any, arguments: Any, output: Any) -> None:
        output[0].register_hook(gradients.append)

    transformer.register_forward_hook(watch)
    list(train_lora(transformer, inputs.family, source, names, config.train))
    assert len(gradients) == 3 and not source.encoded_live
    for gradient in gradients:  # (1, noise and reference tokens, C)
        shown = gradient[0].abs().amax(dim=1) > 0
        noise, references = shown[:16].reshape(4, 4), shown[16:]  # 64 pixels are 4 x 4 packed latents
        assert noise[:, :2].all() and not noise[:, 2:].any()
        assert len(references) > 0 and not references.any()


def test_repeats_of_the_data_set_make_epochs_longer(config: RunConfig) -> None:
    repeated = check_config(config.model_dump(exclude={"train"}), {"data.repeats": 3, "train.epochs": 2})
    repeated = _with(repeated, rank=2, batch_size=4)
    events: list[Event] = []
    found = carry_out(repeated, *CACHED, "train", listener=events.append)
    assert found["train"]["steps"] == 2 * 3 * 4 // 4
    metrics = [event for event in events if event["kind"] == "metric"]
    assert metrics[-1]["epoch"] == 2.0
    totals = [event["total"] for event in events if event["kind"] == "progress" and event["stage"] == "train"]
    assert set(totals) == {6}
    once = RunInputs(check_config(repeated.model_dump(), {"data.repeats": 1}), repeated.run_dir)
    identities = [
        run_identity(one, sorted(s.name for s in one.samples), make_accelerator(device="cpu"))
        for one in (RunInputs(repeated, repeated.run_dir), once)
    ]
    assert identities[0]["model"] == identities[1]["model"] and identities[0]["data"] != identities[1]["data"]


def test_tensorboard_gets_the_numbers_of_every_step(config: RunConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: list[Event] = []
    carry_out(_with(config, log_with=["tensorboard"]), *CACHED, "train", listener=events.append)
    metrics = [event for event in events if event["kind"] == "metric"]
    [file] = (config.run_dir / "logs" / config.name).glob("events.out.*")
    written = EventAccumulator(str(file))
    written.Reload()
    for name in ("loss", "learning_rate", "grad_norm"):
        points = [(point.step, point.value) for point in written.Scalars(name)]
        assert points == [(event["step"], pytest.approx(event[name], rel=1e-6)) for event in metrics]


def test_an_error_in_one_of_two_processes_ends_both(config: RunConfig) -> None:
    shared = _with(config, processes=2)
    save_config(shared, shared.run_dir / "config.yaml")
    (shared.run_dir / "manifest.json").write_text("{}")
    ended = _stage(shared)
    assert ended.returncode == 1
    assert "is damaged" in ended.stdout


def _stage(config: RunConfig) -> subprocess.CompletedProcess[str]:
    """The training stage in a process of its own, which may start others."""
    command = [sys.executable, "-m", "dittocache.jobs.stage", "train", "--run-dir", str(config.run_dir)]
    return subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=110
    )


def test_what_the_settings_need_is_asked_for_first(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dittocache.training.accelerator.importlib.util.find_spec", lambda name: None)
    wanting = _with(
        config, optimizer="nowhere.Optimizer", base_quantization="nf4", log_with=["wandb"], mixed_precision="fp16"
    )
    with pytest.raises(ConfigError) as caught:
        carry_out(wanting, "validate")
    found = caught.value.problems
    for words in ("pip install nowhere", "nf4 needs a GPU", "pip install wandb", "fp16 needs a GPU"):
        assert any(words in problem for problem in found), words


WAITING = """
import sys, time
from pathlib import Path
from dittocache.jobs import training_processes
training_processes.GRACE_SECONDS = 0.5
with training_processes.other_processes(Path(sys.argv[1]), 2):
    time.sleep(100)  # stands for an operation that waits for the other process
"""


def test_a_process_that_waits_for_a_dead_one_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITING, str(tmp_path / "no such run")]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90)
    assert ended.returncode == 1
    assert "there is no config file" in ended.stderr
    assert "because of process 1 with code 2" in ended.stderr
