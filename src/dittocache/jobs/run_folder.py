"""A run's folder: what lies where, who works in it, and how it stands.

    RUN/config.yaml    every setting, resolved         RUN/lora/         the trained LoRA
    RUN/events.jsonl   what happened, event by event   RUN/checkpoints/  of an unfinished or finished training
    RUN/log.txt        output of the stages            RUN/samples/      pictures made
    RUN/manifest.json  what is trained on              RUN/report.html   the report
    RUN/profile.json   calibrated, tuned settings      RUN/tuning/       what was measured for them
    RUN/lock           held while a process works here
    RUN/cached.txt     keys of the records that this run encoded, where they are to be removed after training
    RUN/workers/       a folder like this one, with config and events, for each further process that encodes

Whether a run is at work is never stored: it is read from the lock, which the system releases when the last
process of the run is gone, however it ended.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dittocache.errors import ConfigError, StageError
from dittocache.events import Event, read_events

CONFIG_NAME = "config.yaml"
EVENTS_NAME = "events.jsonl"
LOG_NAME = "log.txt"
LOCK_NAME = "lock"
LORA_NAME = "lora"
CHECKPOINTS_NAME = "checkpoints"
SAMPLES_NAME = "samples"
REPORT_NAME = "report.html"
PROFILE_NAME = "profile.json"
TUNING_NAME = "tuning/tuning.json"
CACHED_NAME = "cached.txt"
WORKERS_NAME = "workers"
WORKFLOW = "workflow"  # stage name of the events that belong to no single stage

State = Literal["new", "running", "finished", "stopped", "failed", "died"]


@dataclass(frozen=True)
class RunStatus:
    """How a run stands. `stage` is the last one that began; `detail` says why it failed or died, else is empty."""

    state: State
    stage: str = ""
    detail: str = ""


def run_status(run_dir: Path) -> RunStatus:
    """How the run stands, from its lock and its last events."""
    started: Event | None = None
    ended: Event | None = None
    for event in read_events(run_dir / EVENTS_NAME):
        if event["kind"] == "stage_started":
            started, ended = event, None
        elif event["kind"] in ("stage_finished", "stage_failed"):
            ended = event
    stage = str((ended or started or {}).get("stage", ""))
    if is_locked(run_dir):
        return RunStatus("running", stage)
    if started is None:
        return RunStatus("new")
    if ended is None or (ended["kind"] == "stage_finished" and ended["stage"] != WORKFLOW):
        return RunStatus("died", stage, "its process ended without a word; what was finished is kept")
    if ended["kind"] == "stage_finished":
        return RunStatus("finished", stage)
    state: State = "stopped" if ended.get("stopped") else "failed"
    return RunStatus(state, stage, str(ended.get("error", "")))


def is_locked(run_dir: Path) -> bool:
    """Whether a process works in the folder now."""
    try:
        descriptor = os.open(run_dir / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def held_folder(run_dir: Path, wait_seconds: float = 10.0) -> Iterator[int]:
    """Hold the folder for this process and those that inherit the yielded descriptor.

    Waits a little for a stage that is ending; raises StageError when another run is at work there, and
    ConfigError when the folder cannot be made or written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"the run folder {run_dir} cannot be written ({error.strerror or error}); choose another output_dir or name"
        ) from error
    try:
        deadline = time.monotonic() + wait_seconds
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise StageError(
                    f"another run is at work in {run_dir}; stop it, wait for its end, or choose another name"
                )
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
