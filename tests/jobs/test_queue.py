"""Jobs wait for their devices, run in order, and none is lost or run twice, whoever is ended when."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dittocache.config import RunConfig, check_config
from dittocache.errors import ConfigError, StageError
from dittocache.events import read_events
from dittocache.jobs.background.stopping import stop_run
from dittocache.jobs.queue.folder import Queue
from dittocache.jobs.queue.job import Job, devices_of
from dittocache.jobs.queue.runner import ensure_runner, run_queue
from dittocache.jobs.queue.scheduling import startable
from dittocache.jobs.run_folder import held_folder, is_locked

# Stands for the process of a run: the run's name says what it does.
RUN = """#!{python}
import os, signal, sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from dittocache.events import EventLog
run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
def stop(number, frame):
    EventLog(run_dir / "events.jsonl", "train").emit("stage_failed", error="stopped", returncode=130, stopped=True)
    os._exit(130)
signal.signal(signal.SIGINT, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
with open(run_dir.parent / "order.txt", "a") as order:
    order.write(run_dir.name + "\\n")
log = EventLog(run_dir / "events.jsonl", "train")
log.emit("stage_started", pid=os.getpid(), command=["train"])
if "long" in run_dir.name:
    time.sleep(60)
if "killed" in run_dir.name:
    os.kill(os.getpid(), signal.SIGKILL)
if "bad" in run_dir.name:
    log.emit("stage_failed", error="it broke", hint="", returncode=1)
    sys.exit(1)
log.emit("stage_finished", seconds=0.0)
EventLog(run_dir / "events.jsonl", "workflow").emit("stage_finished", seconds=0.0)
"""


@pytest.fixture
def player(tmp_path: Path) -> str:
    path = tmp_path / "player"
    path.write_text(RUN.format(python=sys.executable, paths=[path for path in sys.path if path]))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "queue")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(name: str, device: str = "cpu") -> RunConfig:
        model = {"path": "bundled", "device": device}
        return check_config({"name": name, "output_dir": tmp_path / "runs", "model": model, "data": {"path": "data"}})

    return make


def order(queue: Queue) -> list[str]:
    return (queue.folder.parent / "runs" / "order.txt").read_text().split()


def states(queue: Queue) -> list[str]:
    return [entry.state for entry in queue.entries()]


def test_fifty_jobs_run_one_after_the_other_in_the_order_of_adding(
    queue: Queue, run: Callable[..., RunConfig], player: str
) -> None:
    names = [f"job-{number}" for number in range(50)]
    for name in names:
        queue.add(run(name), ["train"])
    assert run_queue(queue, player, poll_seconds=0.002)
    assert order(queue) == names
    assert states(queue) == ["finished"] * 50
    ends = []
    for name in names:
        times = [event["time"] for event in read_events(queue.folder.parent / "runs" / name / "events.jsonl")]
        ends.append((times[0], times[-1]))
    assert all(earlier[1] <= later[0] for earlier, later in zip(ends, ends[1:], strict=False))


def test_a_job_that_fails_or_cannot_start_does_not_hold_up_the_next(
    queue: Queue, run: Callable[..., RunConfig], player: str
) -> None:
    for name in ("good-1", "bad", "killed", "good-2"):
        queue.add(run(name), ["train"])
    (queue.folder.parent / "runs").mkdir()
    (queue.folder.parent / "runs" / "file").write_text("")
    queue.add(run("file"), ["train"])
    queue.add(run("good-3"), ["train"])
    run_queue(queue, player, poll_seconds=0.002)
    assert states(queue) == ["finished", "failed", "died", "finished", "failed", "finished"]
    entries = queue.entries()
    assert entries[1].detail == "it broke"
    assert "file cannot be written" in entries[4].detail


def test_a_missing_interpreter_fails_the_job_by_name(queue: Queue, run: Callable[..., RunConfig]) -> None:
    queue.add(run("one"), ["train"])
    run_queue(queue, "/nowhere/python", poll_seconds=0.002)
    assert "Python interpreter '/nowhere/python' cannot be run" in queue.entries()[0].detail


def test_a_waiting_job_can_be_removed_and_a_running_one_stopped(
    queue: Queue, run: Callable[..., RunConfig], player: str
) -> None:
    jobs = [queue.add(run(name), ["train"]) for name in ("long", "unwanted", "last")]
    runner = threading.Thread(target=run_queue, args=(queue, player), kwargs={"poll_seconds": 0.01})
    runner.start()
    train = jobs[0].run_dir / "events.jsonl"
    while not any(event["stage"] == "train" for event in read_events(train)):
        pass
    assert states(queue) == ["running", "waiting", "waiting"]
    with pytest.raises(StageError, match="job 1 is running"):
        queue.remove(1)
    queue.remove(2)
    with pytest.raises(StageError, match="no job 2"):
        queue.remove(2)
    assert stop_run(jobs[0].run_dir)
    runner.join(30)
    assert [(entry.job.number, entry.state) for entry in queue.entries()] == [(1, "stopped"), (3, "finished")]
    assert order(queue) == ["long", "last"]
    assert queue.clear() == 2
    assert queue.add(run("next"), ["train"]).number == 1


def test_a_second_runner_leaves_the_work_to_the_first(queue: Queue, run: Callable[..., RunConfig], player: str) -> None:
    queue.add(run("one"), ["train"])
    with queue.runner_lock() as held:
        assert held
        assert not run_queue(queue, player)
        assert not ensure_runner(queue, player)
    assert states(queue) == ["waiting"]


def test_what_a_runner_leaves_when_it_dies_is_found_by_the_next(
    queue: Queue, run: Callable[..., RunConfig], player: str
) -> None:
    claimed, begun, waiting = (queue.add(run(name), ["train"]) for name in ("claimed", "begun", "waiting"))
    assert queue.claim(claimed)  # ended before it could start the run
    assert queue.claim(begun)
    run_of = queue.folder.parent / "runs" / "begun"
    run_of.mkdir(parents=True)
    start = {
        "time": 1.0,
        "stage": "workflow",
        "kind": "stage_started",
        "pid": 1,
        "command": ["train"],
        "job": begun.key,
    }
    (run_of / "events.jsonl").write_text(json.dumps(start) + "\n")  # ended after it had started the run, which died
    assert states(queue) == ["waiting", "died", "waiting"]
    run_queue(queue, player, poll_seconds=0.002)
    assert order(queue) == ["claimed", "waiting"]
    assert states(queue) == ["finished", "died", "finished"]


def test_a_run_that_outlives_its_runner_keeps_its_device(
    queue: Queue, run: Callable[..., RunConfig], player: str
) -> None:
    first, second = queue.add(run("first"), ["train"]), queue.add(run("second"), ["train"])
    assert queue.claim(first)
    with held_folder(first.run_dir):  # at work still, though who started it is gone
        started: list[str] = []
        runner = threading.Thread(target=run_queue, args=(queue, player, started.append, 0.002))
        runner.start()
        while not queue.started():
            pass
        assert not is_locked(second.run_dir)
        assert states(queue)[0] == "running"
    runner.join(30)
    assert order(queue) == ["first", "second"]


def test_a_started_job_whose_folder_was_deleted_is_not_run_again(
    queue: Queue, run: Callable[..., RunConfig], player: str
) -> None:
    job = queue.add(run("gone"), ["train"])
    queue.claim(job)
    queue.note_begun(job)
    run_queue(queue, player, poll_seconds=0.002)
    assert [(entry.state, "is gone" in entry.detail) for entry in queue.entries()] == [("died", True)]


def test_a_damaged_file_holds_up_nothing(queue: Queue, run: Callable[..., RunConfig], player: str) -> None:
    (queue.folder / "waiting" / "000001.json").write_bytes(b"\xff{")
    (queue.folder / "waiting" / "000002.json").write_text("[]")
    job = queue.add(run("good"), ["train"])
    assert job.number == 3
    run_queue(queue, player, poll_seconds=0.002)
    assert states(queue) == ["finished"]


def test_a_queue_that_cannot_be_made_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="DITTOCACHE_QUEUE"):
        Queue(tmp_path / "file" / "queue")


def test_devices_of_a_run(run: Callable[..., RunConfig]) -> None:
    assert devices_of(run("one")) == {"cpu"}
    with pytest.raises(ConfigError, match="model.device"):
        devices_of(run("one", "cuda:99"))


def _job(number: int, devices: tuple[str, ...]) -> Job:
    config: dict[str, Any] = {"output_dir": "runs", "name": str(number)}
    return Job(number, config, ("train",), devices, ".", None, "", 0.0)


DEVICES = st.sets(st.sampled_from(["cpu", "cuda:0", "cuda:1", "cuda:2"]), min_size=1)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(DEVICES, max_size=8), st.sets(st.sampled_from(["cpu", "cuda:0", "cuda:1"])))
def test_no_two_jobs_share_a_device_and_none_overtakes_another_for_one(wanted: list[set[str]], busy: set[str]) -> None:
    jobs = [_job(number, tuple(sorted(devices))) for number, devices in enumerate(wanted)]
    chosen = startable(jobs, busy)
    used = [device for job in chosen for device in job.devices]
    assert len(used) == len(set(used))
    assert not busy & set(used)
    for job in jobs:
        earlier = {device for one in jobs[: job.number] for device in one.devices}
        assert (job in chosen) == (not (set(job.devices) & (busy | earlier)))
