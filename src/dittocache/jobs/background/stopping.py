"""Stops a run, whoever started it: found from its folder, by its living processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dittocache.errors import StageError
from dittocache.events import EventLog, number_in, read_events
from dittocache.jobs.failures import STOPPED
from dittocache.jobs.process_identity import is_alive, with_descendants
from dittocache.jobs.run_folder import EVENTS_NAME, WORKFLOW, is_locked, run_status

START_SECONDS = 5.0  # a run that holds its folder says its first word within this time


def stop_run(run_dir: Path) -> bool:
    """Ask the run to end: the first time in good order (the step is finished and saved), the second time at once.

    Returns False where no run is at work. Raises StageError where one is, but its process is not on this machine.
    """
    pid = _workflow_of(run_dir)
    if pid is None:
        return False
    with suppress(ProcessLookupError):  # it ended this moment
        os.kill(pid, signal.SIGINT)
    return True


def kill_run(run_dir: Path, seconds: float = 10.0) -> bool:
    """End every process of the run now; what was finished and saved is kept.

    For runs that `stop_run`, asked twice, did not end. Returns False where no run is at work. Raises StageError where
    its processes are not on this machine, or are still there after `seconds`.
    """
    if not is_locked(run_dir):
        return False
    workflow = _alive(run_dir, (WORKFLOW,))
    stages = _alive(run_dir)
    if not stages:
        raise StageError(_elsewhere(run_dir))
    stage = run_status(run_dir).stage
    everyone = with_descendants(stages)
    _kill(workflow)  # first, or it would start the next stage, or tell of a failure
    _kill(everyone)
    deadline = time.monotonic() + seconds
    while is_locked(run_dir):
        if time.monotonic() > deadline:
            raise StageError(f"a process of the run in {run_dir} does not end; restart the machine, or ask who runs it")
        time.sleep(0.05)
    log = EventLog(run_dir / EVENTS_NAME, stage or WORKFLOW)
    log.emit("stage_failed", error="ended at once on request", hint="", returncode=STOPPED, stopped=True)
    return True


def _workflow_of(run_dir: Path) -> int | None:
    """The number of the process that runs the workflow; None where nothing is at work in the folder."""
    deadline = time.monotonic() + START_SECONDS
    while is_locked(run_dir):
        found = _alive(run_dir, (WORKFLOW,))
        if found:
            return found[0]
        if _alive(run_dir):  # the workflow is gone, and its stage is ending because of that
            return None
        if time.monotonic() > deadline:
            raise StageError(_elsewhere(run_dir))
        time.sleep(0.05)
    return None


def _alive(run_dir: Path, stages: Iterable[str] = ()) -> list[int]:
    """Processes that said they run these stages, or any, of the run started last, and are still there."""
    found: dict[str, tuple[int, str]] = {}
    for event in read_events(run_dir / EVENTS_NAME):
        if event["kind"] == "stage_started":
            if event["stage"] == WORKFLOW:
                found.clear()
            found[event["stage"]] = (int(number_in(event, "pid") or 0), str(event.get("birth", "")))
    wanted = set(stages) or found.keys()
    return [pid for stage, (pid, birth) in found.items() if stage in wanted and is_alive(pid, birth)]


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _elsewhere(run_dir: Path) -> str:
    return (
        f"the run in {run_dir} is at work, but not as a process of this machine or container; stop it where it was "
        "started"
    )
