"""Stages in order, first failure stops the rest, Ctrl-C ends in good order: on stages that are played."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dittocache.config import RunConfig, check_config, load_config
from dittocache.errors import StageError
from dittocache.events import Event, EventLog, read_events
from dittocache.jobs import stopper, workflow
from dittocache.jobs.run_folder import is_locked, run_status
from dittocache.jobs.stage import run_stage
from dittocache.jobs.stages import TRAIN
from dittocache.jobs.workflow import StageFailed, WorkflowStopped, run_workflow
from dittocache.training.config import TrainConfig

Play = Callable[[dict[str, Any]], str]


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    settings = {"name": "played", "output_dir": tmp_path, "model": {"path": "bundled"}, "data": {"path": "data"}}
    return check_config(settings)


def stages_started(run: RunConfig) -> list[str]:
    events = read_events(run.run_dir / "events.jsonl")
    return [event["stage"] for event in events if event["kind"] == "stage_started" and event["stage"] != "workflow"]


def test_stages_run_in_order_as_processes_and_the_listener_hears_everything(run: RunConfig, play: Play) -> None:
    heard: list[Event] = []
    assert run_workflow(run, TRAIN, heard.append, python=play({}), typed="dittocache train") == run.run_dir
    assert stages_started(run) == list(TRAIN)
    assert heard == list(read_events(run.run_dir / "events.jsonl"))
    pids = {event["pid"] for event in heard if event["kind"] == "stage_started"}
    assert len(pids) == len(TRAIN) + 1  # each stage its own process, the workflow another
    assert run_status(run.run_dir).state == "finished"
    assert not is_locked(run.run_dir)


def test_a_second_run_hears_only_its_own_events(run: RunConfig, play: Play) -> None:
    python = play({})
    run_workflow(run, TRAIN, python=python)
    heard: list[Event] = []
    run_workflow(run, ["report"], heard.append, python=python)
    assert {event["stage"] for event in heard} == {"workflow", "report"}


def test_stages_with_nothing_to_do_are_not_started_and_say_so(run: RunConfig, play: Play) -> None:
    scenario = {"validate": {"results": [{"cached": {"cache_latents": 120, "cache_text": 160}}]}}
    heard: list[Event] = []
    run_workflow(run, TRAIN, heard.append, python=play(scenario))
    results = {event["stage"]: event for event in heard if event["kind"] == "result" and "encoded" in event}
    assert (results["cache_latents"]["encoded"], results["cache_latents"]["reused"]) == (0, 120)
    assert (results["cache_text"]["encoded"], results["cache_text"]["reused"]) == (0, 160)
    commands = {event["stage"]: event["command"] for event in heard if event["kind"] == "stage_started"}
    assert commands["cache_latents"] == []
    assert commands["train"]


def test_what_an_earlier_validation_found_does_not_count(run: RunConfig, play: Play) -> None:
    run_workflow(run, ["validate"], python=play({"validate": {"results": [{"cached": {"cache_text": 9}}]}}))
    heard: list[Event] = []
    run_workflow(run, TRAIN, heard.append, python=play({}))
    assert all(event["command"] for event in heard if event["kind"] == "stage_started")


def test_an_error_that_says_it_all_is_told_once(run: RunConfig, play: Play) -> None:
    error = "step 2: the loss is nan"
    failed = {"error": error, "hint": "", "returncode": 1}
    with pytest.raises(StageFailed) as caught:
        run_workflow(
            run, ["train"], python=play({"train": {"stderr": f"a bar\n{error}\n", "failed": failed, "code": 1}})
        )
    assert str(caught.value).splitlines() == [
        f"stage train failed (return code 1): {error}",
        f"the whole log: {run.run_dir / 'log.txt'}",
    ]


def test_settings_that_validation_refuses_do_not_stay(run: RunConfig, play: Play) -> None:
    failed = {"error": "a wrong family", "hint": "", "returncode": 2}
    file = run.run_dir / "config.yaml"
    refused = {"validate": {"failed": failed, "code": 2}}
    with pytest.raises(StageFailed):
        run_workflow(run, TRAIN, python=play(refused))
    assert not file.exists()
    run_workflow(run, TRAIN, python=play({}))
    former = file.read_bytes()
    changed = run.model_copy(update={"train": TrainConfig(rank=3)})
    with pytest.raises(StageFailed):
        run_workflow(changed, TRAIN, python=play(refused))
    assert file.read_bytes() == former
    with pytest.raises(StageFailed):
        run_workflow(changed, TRAIN, python=play({"train": {"failed": failed, "code": 2}}))
    assert load_config(file) == changed  # for the run that goes on where this one ended


def test_the_first_failure_stops_the_rest_and_tells_code_output_and_hint(run: RunConfig, play: Play) -> None:
    traceback = "Traceback (most recent call last):\n  line 7\ntorch.OutOfMemoryError: CUDA out of memory\n"
    failed = {"error": "OutOfMemoryError: CUDA out of memory", "hint": "memory ran out: lower it", "returncode": 1}
    python = play({"cache_text": {"stderr": traceback, "failed": failed, "code": 1}})
    with pytest.raises(StageFailed) as caught:
        run_workflow(run, TRAIN, python=python)
    assert stages_started(run) == ["validate", "cache_latents", "cache_text"]
    message = str(caught.value)
    assert "stage cache_text failed (return code 1)" in message
    assert "  | torch.OutOfMemoryError: CUDA out of memory" in message
    assert "hint: memory ran out" in message
    assert "log.txt" in message
    assert run_status(run.run_dir).state == "failed"


def test_problems_of_the_settings_are_not_repeated_as_output(run: RunConfig, play: Play) -> None:
    error = "2 problem(s)\n  - a\n  - b"
    failed = {"error": error, "hint": "", "returncode": 2}
    with pytest.raises(StageFailed) as caught:
        run_workflow(run, TRAIN, python=play({"validate": {"stderr": error, "failed": failed, "code": 2}}))
    assert caught.value.returncode == 2
    assert str(caught.value).count("  - a") == 1


def test_a_stage_that_dies_without_a_word_gets_its_event_and_hint(run: RunConfig, play: Play) -> None:
    with pytest.raises(StageFailed) as caught:
        run_workflow(run, TRAIN, python=play({"train": {"stderr": "step 7\n", "kill": signal.SIGKILL}}))
    message = str(caught.value)
    assert "ended by signal SIGKILL" in message
    assert "memory ran out" in message
    status = run_status(run.run_dir)
    assert (status.state, status.stage, status.detail) == ("failed", "train", "its process was killed")


def test_the_output_of_a_stage_is_its_own(run: RunConfig, play: Play) -> None:
    scenario = {
        "validate": {"stderr": "from validate\n"},
        "cache_latents": {"stdout": "from latents\n", "code": 1},
    }
    with pytest.raises(StageFailed) as caught:
        run_workflow(run, TRAIN, python=play(scenario))
    assert "from latents" in str(caught.value)
    assert "from validate" not in str(caught.value)
    assert "from validate" in (run.run_dir / "log.txt").read_text()


def test_a_stage_that_runs_out_of_disk_says_so_though_it_could_tell_no_event(run: RunConfig, play: Play) -> None:
    words = "Traceback (most recent call last):\nOSError: [Errno 28] No space left on device: 'events.jsonl'\n"
    with pytest.raises(StageFailed) as caught:
        run_workflow(run, TRAIN, python=play({"cache_latents": {"stderr": words, "code": 1}}))
    assert "hint: the disk is full: free space" in str(caught.value)
    status = run_status(run.run_dir)
    assert (status.state, status.stage) == ("failed", "cache_latents")


def test_a_full_disk_under_the_run_folder_is_plain_words(
    run: RunConfig, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    python = play({})
    monkeypatch.setattr("dittocache.events.os.write", full)
    with pytest.raises(StageError, match="cannot be written: No space left on device\nhint: the disk is full"):
        run_workflow(run, TRAIN, python=python)
    monkeypatch.undo()
    assert not is_locked(run.run_dir)


def test_a_stage_that_cannot_tell_its_events_ends_with_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(self: EventLog, kind: str, **fields: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EventLog, "emit", full)
    assert run_stage("validate", tmp_path) == 1
    assert "events.jsonl cannot be written: No space left on device" in capfd.readouterr().err


def test_a_missing_interpreter_is_its_own_message(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="Python interpreter .*nowhere' cannot be run"):
        run_workflow(run, TRAIN, python=str(tmp_path / "nowhere"))
    assert run_status(run.run_dir).state == "failed"


def test_one_interrupt_ends_the_stage_in_good_order(run: RunConfig, play: Play) -> None:
    before = signal.getsignal(signal.SIGINT)
    python = play({"train": {"seconds": 60}})
    _when_started(run, "train", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(WorkflowStopped, match="train was stopped"):
        run_workflow(run, TRAIN, python=python)
    assert run_status(run.run_dir).state == "stopped"
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_ends_it_the_same_way(run: RunConfig, play: Play) -> None:
    python = play({"cache_text": {"seconds": 60}})
    _when_started(run, "cache_text", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(WorkflowStopped):
        run_workflow(run, TRAIN, python=python)
    assert stages_started(run)[-1] == "cache_text"


def test_a_stage_that_does_not_listen_is_killed_after_a_second_interrupt(
    run: RunConfig, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopper, "KILL_AFTER_SECONDS", 0.3)

    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    python = play({"train": {"seconds": 60, "deaf": True}})
    _when_started(run, "train", interrupt_twice)
    started = time.monotonic()
    with pytest.raises(WorkflowStopped):
        run_workflow(run, TRAIN, python=python)
    assert time.monotonic() - started < 30
    assert run_status(run.run_dir).state == "stopped"


def test_two_runs_in_one_folder_are_refused(run: RunConfig, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"import sys, time; sys.path[:0] = {[p for p in sys.path if p]!r}; from pathlib import Path\n"
    program += "from dittocache.jobs.run_folder import held_folder\n"
    program += f"with held_folder(Path({str(run.run_dir)!r})): print('held', flush=True); time.sleep(60)"
    monkeypatch.setattr(workflow, "held_folder", lambda folder: _impatient(folder))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StageError, match="another run is at work"):
            run_workflow(run, TRAIN, python=play({}))
        holder.kill()


def _impatient(folder: Path) -> Any:
    from dittocache.jobs.run_folder import held_folder

    return held_folder(folder, wait_seconds=0.1)


def _when_started(run: RunConfig, stage: str, act: Callable[[], None]) -> None:
    """Do something once the stage has started, from another thread."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while stage not in stages_started(run) and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    threading.Thread(target=wait, daemon=True).start()
