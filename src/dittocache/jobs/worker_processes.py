"""Further processes that encode beside a caching stage: the same stage, each with a folder and events of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dittocache.config import RunConfig, save_config
from dittocache.events import Event, EventLog, read_events
from dittocache.jobs.failures import STOPPED_CODES, describe_returncode
from dittocache.jobs.run_folder import CONFIG_NAME, EVENTS_NAME, WORKERS_NAME

_SECONDS_TO_REPORT = 5.0
_SECONDS_TO_END = 30.0  # a worker that is told to end stores its batch first


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    lifeline: int
    events: Path
    offset: int


class WorkerProcesses:
    """Starts workers 1 to `count` of a stage; a context manager that leaves none behind.

    Args:
        stage: its name.
        config, run_dir: of the run; a worker's own folder is `RUN/workers/NUMBER`.
        log: of the stage; says which worker failed, and why.

    A worker that cannot be started, or fails, is no error: whoever is left does its work.
    """

    def __init__(self, stage: str, config: RunConfig, run_dir: Path, count: int, log: EventLog) -> None:
        self._stage = stage
        self._config = config
        self._run_dir = run_dir
        self._count = count
        self._log = log
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerProcesses:
        for number in range(1, self._count + 1):
            try:
                self._workers.append(self._start(number))
            except OSError as error:
                self._log.message(f"worker {number} cannot start ({error.strerror or error})", level="warning")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._wait(_SECONDS_TO_END / 3)  # Ctrl-C reached the whole group: they are ending
        self._let_go()
        self._wait(_SECONDS_TO_END)
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()

    def results(self) -> list[Event]:
        """End all, say who failed, and return what the workers reported as results; for when all work is done."""
        found: list[Event] = []
        self._wait(_SECONDS_TO_REPORT)
        self._let_go()  # what still loads an encoder now comes too late
        self._wait(_SECONDS_TO_END)
        for worker in self._workers:
            worker.process.kill()
            returncode = worker.process.wait()
            events = list(read_events(worker.events, worker.offset))
            found += [event for event in events if event["kind"] == "result"]
            if returncode != 0 and returncode not in STOPPED_CODES:
                failures = [str(event["error"]) for event in events if event["kind"] == "stage_failed"]
                why = failures[-1] if failures else "it left no message; the end of log.txt may tell more"
                self._log.message(
                    f"worker {worker.number} failed ({describe_returncode(returncode)}): {why}; others did its work",
                    level="warning",
                )
        return found

    def _start(self, number: int) -> _Worker:
        folder = self._run_dir / WORKERS_NAME / str(number)
        save_config(self._config, folder / CONFIG_NAME)
        events = folder / EVENTS_NAME
        offset = events.stat().st_size if events.exists() else 0
        lifeline, mine = os.pipe()  # closes when this process is gone, however it ends
        command = [sys.executable, "-m", "dittocache.jobs.stage", self._stage, "--run-dir", str(folder)]
        command += ["--worker", str(number), "--lifeline", str(lifeline)]
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(lifeline,))
        except OSError:
            os.close(mine)
            raise
        finally:
            os.close(lifeline)
        return _Worker(number, process, mine, events, offset)

    def _let_go(self) -> None:
        """Tell the workers to end in good order."""
        for worker in self._workers:
            if worker.lifeline >= 0:
                os.close(worker.lifeline)
                worker.lifeline = -1

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
