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
from dittocache.events import Event, last_events

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

LAST_EVENTS_BYTES = 2**13  # of a stream that may be long; enough to tell how the run stands

State = Literal["new", "running", "finished", "stopped", "failed", "died"]


@dataclass(frozen=True)
class RunStatus:
    """How a run stands. `stage` is the last one that began; `detail` says why it failed or died, else is empty."""

    state: State
    stage: str = ""
    detail: str = ""


class Ends:
    """Takes events in order and keeps those that tell how the run stands: which stages of it began, and how they ended.

    Attributes:
        failed: the event of the first stage that failed of itself; None where none has.
    """

    def __init__(self) -> None:
        self._ended: dict[str, Event] = {}
        self._last = ""
        self._reused: set[str] = set()

    def add(self, event: Event) -> None:
        """Take the next event."""
        stage, kind = str(event["stage"]), event["kind"]
        if stage == WORKFLOW and kind == "stage_started":
            self._ended, self._reused = {}, set()
        elif stage == WORKFLOW and kind == "message":
            return
        if kind in ("stage_finished", "stage_failed"):
            self._ended[stage] = event
        elif kind == "stage_started":
            self._ended.pop(stage, None)
            if stage != WORKFLOW and not event["command"]:
                self._reused.add(stage)
        elif stage in self._ended:
            return
        self._last = stage

    @property
    def known(self) -> bool:
        """Whether there was any event to tell from."""
        return bool(self._last)

    @property
    def failed(self) -> Event | None:
        failures = (end for end in self._ended.values() if end["kind"] == "stage_failed")
        return next((end for end in failures if not end.get("stopped")), None)

    def was_reused(self, stage: str) -> bool:
        """Whether the stage had nothing to do, so that it was not started."""
        return stage in self._reused

    def status(self, live: bool) -> RunStatus:
        """How the run stands; `live` says whether a process works in its folder."""
        last = self._ended.get(self._last)
        if live:
            ended = last is not None and self._last == WORKFLOW  # another is about to begin
            return RunStatus("running", "" if ended else self._last)
        if not self._last:
            return RunStatus("new")
        if self.failed is not None:
            return RunStatus("failed", self.failed["stage"], self.failed["error"])
        if last is not None and last["kind"] == "stage_failed":
            return RunStatus("stopped", self._last, last["error"])
        if last is not None and self._last == WORKFLOW:
            return RunStatus("finished", WORKFLOW)
        return RunStatus("died", self._last, "its process ended without a word; what was finished is kept")


def run_status(run_dir: Path) -> RunStatus:
    """How the run stands, from its lock and its last events."""
    live = is_locked(run_dir)
    ends, _ = last_told(run_dir)
    return ends.status(live)


def last_told(run_dir: Path) -> tuple[Ends, list[Event]]:
    """The run's last events, as many as it takes to tell how it stands, and what they tell."""
    path = run_dir / EVENTS_NAME
    window = LAST_EVENTS_BYTES
    while True:
        ends, events = Ends(), last_events(path, window)
        for event in events:
            ends.add(event)
        if ends.known or not path.exists() or window >= path.stat().st_size:
            return ends, events
        window *= 16


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
        while not try_lock(descriptor):
            if time.monotonic() > deadline:
                raise StageError(
                    f"another run is at work in {run_dir}; stop it, wait for its end, or choose another name"
                )
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process alone; False where another one has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
