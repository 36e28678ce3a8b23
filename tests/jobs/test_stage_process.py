"""Real stage processes: their ends, wanted and unwanted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.jobs.conftest import draw_set
from tests.jobs.test_whole_run import carry_out

from dittocache.config import RunConfig, check_config, save_config
from dittocache.events import read_events
from dittocache.jobs.process import StageProcess
from dittocache.jobs.run_folder import held_folder
from dittocache.jobs.workflow import StageFailed, run_workflow

# A stage that waits: what happens to its process is the same for all of them, without what they work on, too.
WAITING = """
import sys, time, types
from dittocache.jobs import stage, stages
sys.modules["dittocache.jobs.inputs"] = types.SimpleNamespace(RunInputs=lambda *arguments: None)
waiting = stages.Stage("validate", "__main__", "wait", "Waiting")
stages.STAGES["validate"] = waiting
def wait(inputs, log):
    log.message("waiting")
    time.sleep(60)
sys.exit(stage.main(sys.argv[1:]))
"""


def results(config: RunConfig, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for event in read_events(config.run_dir / "events.jsonl"):
        if event["stage"] == stage and event["kind"] == "result":
            found |= event
    return found


def until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def waiting_stage(config: RunConfig, lifeline: int) -> subprocess.Popen[bytes]:
    save_config(config, config.run_dir / "config.yaml")
    words = ["validate", "--run-dir", str(config.run_dir), "--lifeline", str(lifeline)]
    process = subprocess.Popen([sys.executable, "-c", WAITING, *words], pass_fds=(lifeline,))
    events = config.run_dir / "events.jsonl"
    until(lambda: any(event["kind"] == "message" for event in read_events(events)))
    return process


def test_a_stage_ends_in_good_order_when_its_workflow_is_gone(config: RunConfig) -> None:
    read_end, write_end = os.pipe()
    with waiting_stage(config, read_end) as process:
        os.close(write_end)  # what the system does when the workflow is killed
        assert process.wait(30) == 130
    os.close(read_end)
    assert list(read_events(config.run_dir / "events.jsonl"))[-1]["stopped"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_mean_stop(config: RunConfig, number: int) -> None:
    read_end, write_end = os.pipe()
    with waiting_stage(config, read_end) as process:
        process.send_signal(number)
        assert process.wait(30) == 130
    os.close(read_end)
    os.close(write_end)


def test_validation_as_a_process_lists_the_problems(config: RunConfig) -> None:
    (config.data.path / "training_images" / "edit-1.txt").unlink()
    with pytest.raises(StageFailed, match=r"stage validate failed \(return code 2\)") as caught:
        run_workflow(config, ["validate"])
    assert "edit-1.png: no caption" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_after_kill_9_while_caching_nothing_finished_is_encoded_again(config: RunConfig, tmp_path: Path) -> None:
    data = draw_set(tmp_path / "many", 12)
    config = check_config(config.model_dump(), {"data.path": data, "cache.batch_size": 1, "held_out": None})
    save_config(config, config.run_dir / "config.yaml")
    objects = config.cache.cache_dir / "objects"
    with held_folder(config.run_dir) as lock:
        process = StageProcess("cache_latents", config.run_dir, lock)
        until(lambda: len(list(objects.rglob("*.safetensors"))) > 5)
        process.send(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finished = {path.name: path.stat().st_mtime_ns for path in objects.rglob("*.safetensors")}
    carry_out(config, "validate", "cache_latents")
    found = results(config, "cache_latents")
    assert found["reused"] == len(finished)
    assert found["encoded"] == 25 - len(finished)  # 12 times two latents, and one plain fact that all share
    assert len(finished) < 25, "the kill came too late to show anything"
    again = {path.name: path.stat().st_mtime_ns for path in objects.rglob("*.safetensors")}
    assert {name: again[name] for name in finished} == finished
