"""Runs in the background: they outlive their starter, are found from their folder, and end with all their processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dittocache.config import RunConfig, check_config
from dittocache.errors import StageError
from dittocache.events import EventLog, read_events
from dittocache.jobs.background import stopping
from dittocache.jobs.background.starting import start_run
from dittocache.jobs.background.stopping import kill_run, stop_run
from dittocache.jobs.following.follower import RunFollower
from dittocache.jobs.process_identity import birth_of, is_alive
from dittocache.jobs.run_folder import held_folder, is_locked, run_status
from dittocache.jobs.stages import TRAIN

Play = Callable[[dict[str, Any]], str]

# The interpreter of a run in the background: the run itself is real, its stages are played.
REAL_RUN = """#!{python}
import functools, sys
sys.path[:0] = {paths!r}
from dittocache.jobs import stopper, workflow
from dittocache.jobs.background.workflow_process import main
stopper.KILL_AFTER_SECONDS = 0.2
workflow.run_workflow = functools.partial(workflow.run_workflow, python={player!r})
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunConfig]:
    settings = {"name": "played", "output_dir": tmp_path, "model": {"path": "bundled"}, "data": {"path": "data"}}
    config = check_config(settings)
    yield config
    if is_locked(config.run_dir):
        kill_run(config.run_dir)


@pytest.fixture
def background(tmp_path: Path, play: Play) -> Play:
    def write(scenario: dict[str, Any]) -> str:
        path = tmp_path / "background"
        text = REAL_RUN.format(python=sys.executable, paths=[path for path in sys.path if path], player=play(scenario))
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    return write


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def pids(run_dir: Path) -> list[int]:
    return [event["pid"] for event in read_events(run_dir / "events.jsonl") if event["kind"] == "stage_started"]


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_run_goes_on_when_its_starter_is_gone(run: RunConfig, background: Play, tmp_path: Path) -> None:
    python = background({"train": {"seconds": 0.2}})
    program = f"""
import json, sys
sys.path[:0] = {[path for path in sys.path if path]!r}
from dittocache.config import check_config
from dittocache.jobs.background.starting import start_run
config = check_config(json.loads({run.model_dump_json()!r}))
start_run(config, {TRAIN!r}, typed="dittocache train", python={python!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    assert run_status(run.run_dir).state in ("running", "finished")
    until(lambda: not is_locked(run.run_dir))
    follower = RunFollower(run.run_dir)
    follower.poll()
    view = follower.view()
    assert (view.state, view.typed) == ("finished", "dittocache train")
    assert [(stage.name, stage.state) for stage in view.stages] == [(stage, "finished") for stage in TRAIN]


def test_a_second_start_is_refused_and_a_stop_that_comes_early_counts(run: RunConfig, background: Play) -> None:
    python = background({"train": {"seconds": 60}})
    run_dir = start_run(run, TRAIN, python=python)
    assert run_status(run_dir).state == "running"  # before its process has said a word
    with pytest.raises(StageError, match="another run is at work"):
        start_run(run, TRAIN, python=python)
    assert stop_run(run_dir)
    until(lambda: not is_locked(run_dir))
    assert run_status(run_dir).state == "stopped"
    assert not stop_run(run_dir)
    assert not kill_run(run_dir)


def test_a_stage_that_does_not_listen_is_killed_by_the_second_stop(run: RunConfig, background: Play) -> None:
    run_dir = start_run(run, ["train"], python=background({"train": {"seconds": 60, "deaf": True}}))
    until(lambda: len(pids(run_dir)) == 2)
    follower = RunFollower(run_dir)
    for requests in (1, 2):
        assert stop_run(run_dir)
        until(lambda asked=requests: follower.poll() is not None and follower.view().stop_requests >= asked)
    until(lambda: not is_locked(run_dir))
    follower.poll()
    assert follower.view().state == "stopped"
    assert [stage.state for stage in follower.view().stages] == ["stopped"]
    assert all(gone(pid) for pid in pids(run_dir))


def test_a_run_that_hangs_is_ended_with_everything_it_has_started(run: RunConfig, background: Play) -> None:
    scenario = {"train": {"seconds": 60, "deaf": True, "children": 2}}
    run_dir = start_run(run, ["train"], python=background(scenario))
    children = run_dir / "children"
    until(lambda: children.exists() and len(children.read_text().split()) == 2)
    everyone = [*pids(run_dir), *map(int, children.read_text().split())]
    os.kill(everyone[0], signal.SIGSTOP)  # the workflow itself answers no more
    assert kill_run(run_dir)
    until(lambda: all(gone(pid) for pid in everyone))
    assert run_status(run_dir).state == "stopped"


def test_what_a_stage_leaves_behind_is_ended_with_it(run: RunConfig, background: Play) -> None:
    scenario = {"train": {"children": 2, "kill": signal.SIGKILL}}
    run_dir = start_run(run, ["train"], python=background(scenario))
    until(lambda: not is_locked(run_dir))
    assert all(gone(int(pid)) for pid in (run_dir / "children").read_text().split())
    assert run_status(run_dir).state == "failed"


ORPHAN = """
import os, signal, subprocess, sys, threading, time
from dittocache.jobs import stage
stage.ORPHAN_SECONDS = 0.2
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a stage that hangs
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
threading.Thread(target=stage._stop_when_orphaned, args=(int(sys.argv[1]),), daemon=True).start()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_after_kill_9_of_the_workflow_no_process_is_left_even_of_a_stage_that_hangs() -> None:
    """The pipe that closes stands for the workflow's end: the system closes it, whatever ended that process."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-c", ORPHAN, str(read_end)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[read_end], start_new_session=True) as stage:
        assert stage.stdout is not None
        child = int(stage.stdout.readline())
        os.close(read_end)
        os.close(write_end)
        assert stage.wait(30) == -signal.SIGKILL
        until(lambda: gone(child))


def test_a_process_that_cannot_even_begin_is_seen_with_its_last_words(run: RunConfig, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no module named dittocache >&2\nexit 1\n")
    broken.chmod(0o755)
    run_dir = start_run(run, TRAIN, python=str(broken))
    until(lambda: not is_locked(run_dir))
    follower = RunFollower(run_dir)
    view = follower.view()
    assert view.state == "died" and view.failure is not None
    assert "no module named dittocache" in view.failure.log_tail


def test_a_missing_interpreter_is_its_own_message_and_lets_go_of_the_folder(run: RunConfig) -> None:
    with pytest.raises(StageError, match="Python interpreter '/nowhere' cannot be run"):
        start_run(run, TRAIN, python="/nowhere")
    assert not is_locked(run.run_dir)
    assert run_status(run.run_dir).state == "new"


def test_settings_of_another_version_end_the_run_with_a_message(run: RunConfig, background: Play) -> None:
    spoilt = run.model_copy(update={"name": "played"})
    object.__setattr__(spoilt.train, "rank", 0)
    run_dir = start_run(spoilt, TRAIN, python=background({}))
    until(lambda: not is_locked(run_dir))
    assert "train.rank" in run_status(run_dir).detail
    object.__setattr__(spoilt.train, "rank", 16)


def test_no_other_process_is_stopped_because_it_got_the_number(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "START_SECONDS", 0.1)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        log = EventLog(run.run_dir / "events.jsonl", "workflow")
        log.emit("stage_started", pid=bystander.pid, birth="another boot:1", command=["train"])
        with held_folder(run.run_dir):
            with pytest.raises(StageError, match="not as a process of this machine"):
                stop_run(run.run_dir)
            with pytest.raises(StageError, match="not as a process of this machine"):
                kill_run(run.run_dir)
        assert bystander.poll() is None
        assert is_alive(bystander.pid, birth_of(bystander.pid))
        bystander.kill()
    assert not is_alive(bystander.pid, birth_of(bystander.pid))
    assert not is_alive(os.getpid(), "")


def test_json_of_the_settings_means_the_same(run: RunConfig) -> None:
    """What goes to the process is what was asked for."""
    assert check_config(json.loads(run.model_dump_json())) == run
