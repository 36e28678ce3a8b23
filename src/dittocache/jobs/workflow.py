"""Runs stages in order: follows their events, stops at the first failure, passes Ctrl-C on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from dittocache.config import RunConfig, save_config
from dittocache.errors import StageError
from dittocache.events import Event, EventLog, follow_events, read_events
from dittocache.jobs.failures import STOPPED, STOPPED_CODES, describe_returncode, hint_for, last_lines
from dittocache.jobs.process import StageProcess
from dittocache.jobs.run_folder import CONFIG_NAME, EVENTS_NAME, LOG_NAME, WORKFLOW, held_folder

Listener = Callable[[Event], None]

KILL_AFTER_SECONDS = 10.0
"""Time that a stage has for ending after a second Ctrl-C."""


class StageFailed(StageError):
    """A stage ended with an error; `returncode` is that of its process."""

    def __init__(self, message: str, returncode: int) -> None:
        super().__init__(message)
        self.returncode = returncode


class WorkflowStopped(StageError):
    """The run was stopped on request, in good order."""


def run_workflow(
    config: RunConfig,
    stages: Sequence[str],
    listener: Listener = lambda event: None,
    python: str = sys.executable,
    typed: str = "",
) -> Path:
    """Run `stages` in order in `config.run_dir` and return that folder.

    Args:
        listener: called with every event of the run, from a thread of its own.
        python: interpreter of the stages.
        typed: what the user typed to start this, for the report.

    Stages that have nothing to do (everything is cached) are not started; an event says so. SIGINT and SIGTERM go to
    the stage, which ends in good order; a second one ends it at once.

    Raises StageFailed (what went wrong, the end of the output, a hint), WorkflowStopped, StageError when another run
    works in the folder.
    """
    run_dir = config.run_dir
    with held_folder(run_dir) as lock:
        save_config(config, run_dir / CONFIG_NAME)
        path = run_dir / EVENTS_NAME
        offset = path.stat().st_size if path.exists() else 0
        log = EventLog(path, WORKFLOW)
        log.emit("stage_started", pid=os.getpid(), command=list(stages), typed=typed)
        started = time.monotonic()
        with _followed(path, offset, listener), _Stopper() as stopper:
            for stage in stages:
                if _has_nothing_to_do(stage, path, offset):
                    continue
                _run_stage(stage, run_dir, lock, python, stopper)
            log.emit("stage_finished", seconds=time.monotonic() - started)
    return run_dir


def _run_stage(stage: str, run_dir: Path, lock: int, python: str, stopper: _Stopper) -> None:
    path = run_dir / EVENTS_NAME
    offset = path.stat().st_size
    log = EventLog(path, stage)
    if stopper.requests:
        log.emit("stage_failed", error="stopped on request", hint="", returncode=STOPPED, stopped=True)
        raise WorkflowStopped(f"stopped before stage {stage}; the same command goes on from here")
    try:
        process = StageProcess(stage, run_dir, lock, python)
    except StageError as problem:
        log.emit("stage_failed", error=str(problem), hint="", returncode=127)
        raise
    stopper.watch(process)
    while (returncode := process.wait(0.2)) is None:
        stopper.enforce()
    if returncode == 0:
        return
    failure = next((event for event in read_events(path, offset) if event["kind"] == "stage_failed"), None)
    stopped = bool(stopper.requests) and returncode in STOPPED_CODES | {-signal.SIGKILL}
    if failure is None:  # killed, or never got as far as its own error handling
        output = process.output()
        error = "stopped on request" if stopped else last_lines(output, 1) or "it left no output"
        hint = "" if stopped else hint_for(returncode, output)
        failure = {"error": error, "hint": hint}
        log.emit("stage_failed", returncode=returncode, stopped=stopped, **failure)
    if stopped or returncode in STOPPED_CODES:
        raise WorkflowStopped(f"stage {stage} was stopped; the same command goes on from here")
    raise StageFailed(_failure_message(stage, returncode, failure, process.output(), run_dir), returncode)


def _failure_message(stage: str, returncode: int, failure: Event, output: str, run_dir: Path) -> str:
    lines = [f"stage {stage} failed ({describe_returncode(returncode)}): {failure['error']}"]
    tail = last_lines(output)
    if tail and tail != failure["error"].strip() and returncode != 2:
        lines += ["the end of its output:", *(f"  | {line}" for line in tail.splitlines())]
    if failure["hint"]:
        lines.append(f"hint: {failure['hint']}")
    lines.append(f"the whole log: {run_dir / LOG_NAME}")
    return "\n".join(lines)


def _has_nothing_to_do(stage: str, path: Path, offset: int) -> bool:
    """Whether validation found everything of this stage cached; if so, an event says it in the stage's name."""
    found = [event for event in read_events(path, offset) if event["stage"] == "validate" and "cached" in event]
    reused = found[-1]["cached"].get(stage) if found else None
    if reused is None:
        return False
    log = EventLog(path, stage)
    log.emit("stage_started", pid=os.getpid(), command=[])
    log.emit("result", encoded=0, reused=reused, bytes_written=0, seconds=0.0, failed={})
    log.emit("stage_finished", seconds=0.0)
    return True


class _Stopper:
    """Turns SIGINT and SIGTERM of this process into an orderly end of the stage at work."""

    def __init__(self) -> None:
        self.requests = 0
        self._process: StageProcess | None = None
        self._kill_at = float("inf")
        self._former: dict[int, object] = {}

    def __enter__(self) -> _Stopper:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def watch(self, process: StageProcess) -> None:
        """From now on, requests go to this process."""
        self._process = process
        self._kill_at = float("inf")

    def enforce(self) -> None:
        """Kill the stage when it has had its time after a second request."""
        if self._process is not None and time.monotonic() > self._kill_at:
            self._process.send(signal.SIGKILL)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requests += 1
        if self._process is not None:
            self._process.send(signal.SIGINT if self.requests < 3 else signal.SIGKILL)
        if self.requests == 2:
            self._kill_at = time.monotonic() + KILL_AFTER_SECONDS


@contextlib.contextmanager
def _followed(path: Path, offset: int, listener: Listener) -> Iterator[None]:
    """Give every event from `offset` on to the listener until the block ends, the last ones included."""
    done = threading.Event()

    def follow() -> None:
        for event in follow_events(path, done.is_set, offset=offset):
            listener(event)

    follower = threading.Thread(target=follow, name="event-follower", daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()
