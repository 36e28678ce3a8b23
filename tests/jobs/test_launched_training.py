"""Training as processes that `accelerate launch` starts, by its real command line (gloo, CPU)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.jobs.test_whole_run import carry_out
from tests.training.processes import environment

from dittocache.config import RunConfig, save_config
from dittocache.events import Event, read_events
from dittocache.jobs.ranks import lost_processes
from dittocache.training.checkpoint import checkpoints
from dittocache.training.lora import WEIGHT_NAME, read_settings

CACHED = ("validate", "cache_latents", "cache_text")
pytestmark = pytest.mark.usefixtures("encoded")
TWO = ("--multi_gpu", "--num_processes", "2", "--main_process_port", str(25_000 + os.getpid() % 5_000))


@pytest.fixture
def cached(config: RunConfig) -> Callable[..., RunConfig]:
    """A run with these settings of `train`, its data set cached and its settings saved."""

    def make(name: str = "tiny", **settings: Any) -> RunConfig:
        run = config.model_copy(update={"name": name, "train": config.train.model_copy(update=settings)})
        carry_out(run, *CACHED)
        save_config(run, run.run_dir / "config.yaml")
        return run

    return make


def _launch(run: RunConfig, options: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "dittocache.jobs.stage", "train"]
    return subprocess.Popen(
        [*command, "--run-dir", str(run.run_dir)],
        env=environment(TOKENIZERS_PARALLELISM="false"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _events(run: RunConfig) -> list[Event]:
    return [event for event in read_events(run.run_dir / "events.jsonl") if event["stage"] == "train"]


def _lora(run: RunConfig) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(run.run_dir / "lora" / WEIGHT_NAME)
    return weights


@pytest.mark.timeout(300)  # three processes are started, then two, on a machine that may be busy
def test_two_processes_train_as_one_with_twice_the_batch_whoever_started_them(
    cached: Callable[..., RunConfig],
) -> None:
    """`accelerate launch` starts the training, which is stopped; the run itself goes on, and starts as many."""
    settings = {"steps": 100, "learning_rate": 2e-3, "checkpoint_every": 1000, "keep_checkpoints": 1}
    shared = cached("shared", **settings, validate_every=50, validation_pictures=1)
    with _launch(shared, TWO) as launcher:
        _until(launcher, lambda: any(event["kind"] == "metric" for event in _events(shared)))
        launcher.send_signal(signal.SIGTERM)
        output = launcher.communicate(timeout=120)[0]
    ends = [event for event in _events(shared) if event["kind"] == "stage_failed"]
    assert [event["stopped"] for event in ends] == [True], output
    [checkpoint] = checkpoints(shared.run_dir / "checkpoints")
    stopped_after = int(checkpoint.name.removeprefix("step-"))
    assert stopped_after < 100, "the signal came too late to show anything"

    own = shared.model_copy(update={"train": shared.train.model_copy(update={"processes": 2})})
    save_config(own, own.run_dir / "config.yaml")
    command = [sys.executable, "-m", "dittocache.jobs.stage", "train", "--run-dir", str(own.run_dir)]
    ended = subprocess.run(command, env=environment(TOKENIZERS_PARALLELISM="false"), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert [event["kind"] for event in _events(shared)].count("stage_finished") == 1
    metrics = [event for event in _events(shared) if event["kind"] == "metric"]
    assert [event["step"] for event in metrics] == list(range(1, 101))  # one process speaks, nothing is done twice
    made = [event["validation"] for event in _events(shared) if "validation" in event]
    assert [one["step"] for one in made] == [50, 100]
    assert all((shared.run_dir / row["picture"]).is_file() for one in made for row in one["pictures"])
    assert read_settings(shared.run_dir / "lora")["global_batch"] == 2

    alone = cached("alone", **settings, batch_size=2)
    carry_out(alone, "train")
    losses = [event["loss"] for event in _events(alone) if event["kind"] == "metric"]
    assert [event["loss"] for event in metrics] == pytest.approx(losses, rel=1e-4)
    expected = _lora(alone)
    moved = max(float(one.abs().max()) for name, one in expected.items() if "lora_B" in name)
    assert moved > 0.01
    for name, tensor in _lora(shared).items():
        assert torch.allclose(tensor, expected[name], atol=moved / 100), name


def test_accelerates_cpu_option_starts_one_process_and_the_run_says_so(
    cached: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cached(steps=1)
    # What `accelerate launch --cpu --num_processes 2` sets.
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    carry_out(run, "train")
    warnings = [event["text"] for event in _events(run) if event.get("level") == "warning"]
    assert len(warnings) == 1 and "set train.processes" in warnings[0]
    assert read_settings(run.run_dir / "lora")["global_batch"] == 1


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MASTER_PORT": "29500"},
        {"ACCELERATE_USE_CPU": "True"},
        {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", "WORLD_SIZE": "2"},
        {"ACCELERATE_USE_CPU": "False", "MASTER_PORT": "29500"},
    ],
)
def test_nothing_is_said_where_nothing_was_lost(variables: dict[str, str]) -> None:
    assert lost_processes(variables) is None


def _until(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "the training did not get so far"
        time.sleep(0.05)
