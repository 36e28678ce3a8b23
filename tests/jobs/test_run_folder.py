"""How a run stands is read from living processes and the last events, never from a stored flag."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dittocache.errors import ConfigError, StageError
from dittocache.events import EventLog
from dittocache.jobs.run_folder import held_folder, is_locked, run_status

HOLDER = """
import sys, time
from pathlib import Path
from dittocache.jobs.run_folder import held_folder
with held_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def events(run_dir: Path, *steps: tuple[str, str]) -> None:
    for stage, kind in steps:
        fields = {"error": "it broke"} if kind == "stage_failed" else {}
        EventLog(run_dir / "events.jsonl", stage).emit(kind, **fields)


def test_a_folder_without_events_is_new(tmp_path: Path) -> None:
    assert run_status(tmp_path / "none").state == "new"


def test_finished_failed_and_stopped(tmp_path: Path) -> None:
    events(tmp_path, ("workflow", "stage_started"), ("train", "stage_started"), ("train", "stage_finished"))
    assert run_status(tmp_path).state == "died"  # a stage ended well, but the workflow never did
    events(tmp_path, ("workflow", "stage_finished"))
    assert run_status(tmp_path).state == "finished"
    events(tmp_path, ("workflow", "stage_started"), ("train", "stage_started"), ("train", "stage_failed"))
    status = run_status(tmp_path)
    assert (status.state, status.stage, status.detail) == ("failed", "train", "it broke")
    EventLog(tmp_path / "events.jsonl", "train").emit("stage_failed", error="stopped on request", stopped=True)
    assert run_status(tmp_path).state == "stopped"


def test_a_killed_holder_is_seen_as_dead_at_once(tmp_path: Path) -> None:
    events(tmp_path, ("workflow", "stage_started"), ("train", "stage_started"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder, holder.stdout:
        holder.stdout.readline()
        assert run_status(tmp_path).state == "running"
        with pytest.raises(StageError, match="another run is at work"), held_folder(tmp_path, wait_seconds=0.2):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert not is_locked(tmp_path)
    status = run_status(tmp_path)
    assert (status.state, status.stage) == ("died", "train")
    with held_folder(tmp_path, wait_seconds=0):
        assert is_locked(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="run folder .*file/run cannot be written"),
        held_folder(tmp_path / "file" / "run"),
    ):
        pass
