"""The caching stages run at the same time where their encoders have different devices, else in turn."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dittocache.config import RunConfig, check_config
from dittocache.events import Event, read_events
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.stages import CACHE, TRAIN
from dittocache.jobs.workflow import StageFailed, WorkflowStopped, run_workflow

Play = Callable[[dict[str, Any]], str]


def run_with(folder: Path, **devices: str) -> RunConfig:
    settings = {"name": "played", "output_dir": folder, "model": {"path": "bundled"}, "data": {"path": "data"}}
    return check_config({**settings, "cache": {"devices": devices}})


def order(run: RunConfig) -> list[tuple[str, str]]:
    events = read_events(run.run_dir / "events.jsonl")
    return [(event["stage"], event["kind"]) for event in events if event["stage"].startswith("cache")]


@pytest.mark.parametrize(
    ("devices", "parallel"),
    [
        ({}, False),
        ({"vae": "cuda:0"}, False),
        ({"vae": "cuda:0", "text_encoder": "cuda:0"}, False),
        ({"vae": "cuda:0", "text_encoder": "cuda:1"}, True),
        ({"vae": "cuda:0", "text_encoder": "cuda:1", "text_encoder_2": "cuda:1"}, True),
        ({"vae": "cuda:1", "text_encoder": "cuda:0", "text_encoder_2": "cuda:1"}, False),
    ],
)
def test_devices_decide(tmp_path: Path, devices: dict[str, str], parallel: bool) -> None:
    assert run_with(tmp_path, **devices).cache.encodes_in_parallel == parallel


def test_both_stages_are_at_work_together(tmp_path: Path, play: Play) -> None:
    run = run_with(tmp_path, vae="cpu:0", text_encoder="cpu")
    player = play({"cache_latents": {"seconds": 1.0}, "cache_text": {"seconds": 1.0}})
    run_workflow(run, TRAIN, python=player)
    assert [kind for _, kind in order(run)] == ["stage_started"] * 2 + ["stage_finished"] * 2
    train = [event for event in read_events(run.run_dir / "events.jsonl") if event["stage"] == "train"]
    assert train, "training follows when both are done"


def test_when_one_fails_the_other_is_stopped_and_the_failure_is_told(tmp_path: Path, play: Play) -> None:
    run = run_with(tmp_path, vae="cpu:0", text_encoder="cpu")
    failed = {"error": "no room", "hint": "", "returncode": 1}
    player = play({"cache_latents": {"seconds": 0.5, "failed": failed, "code": 1}, "cache_text": {"seconds": 60}})
    with pytest.raises(StageFailed, match=r"cache_latents failed \(return code 1\): no room"):
        run_workflow(run, CACHE, python=player)
    ends = {event["stage"]: event for event in read_events(run.run_dir / "events.jsonl") if event["kind"] != "message"}
    assert ends["cache_text"]["stopped"]


def test_ctrl_c_stops_both(tmp_path: Path, play: Play) -> None:
    run = run_with(tmp_path, vae="cpu:0", text_encoder="cpu")
    started: list[str] = []

    def stop_when_both_work(event: Event) -> None:
        if event["kind"] == "stage_started" and event["stage"].startswith("cache"):
            started.append(event["stage"])
            if len(started) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(WorkflowStopped):
        run_workflow(
            run,
            CACHE,
            stop_when_both_work,
            python=play({stage: {"seconds": 60} for stage in CACHE if stage != "validate"}),
        )
    assert [kind for _, kind in order(run)][2:] == ["stage_failed"] * 2


def test_the_manifest_waits_for_the_other_stage(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    read_end, write_end = os.pipe()
    waited = threading.Thread(target=RunInputs(run, run.run_dir, after=read_end).wait_for_stage_beside)
    waited.start()
    waited.join(0.05)
    assert waited.is_alive()
    os.close(write_end)  # what the system does when the other process ends
    waited.join(30)
    assert not waited.is_alive()
    os.close(read_end)
    RunInputs(run, run.run_dir).wait_for_stage_beside()  # no stage beside: no wait
