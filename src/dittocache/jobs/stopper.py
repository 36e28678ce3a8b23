"""What a request to stop means for the stages of a run: the first an orderly end, the second an end at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

from dittocache.events import EventLog
from dittocache.jobs.process import StageProcess

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

KILL_AFTER_SECONDS = 10.0
"""Time that a stage has for ending after a second Ctrl-C."""

_WORDS = {
    1: "stopping: what is under way is finished and saved; stop again to end at once",
    2: f"ending at once; what does not listen is killed after {KILL_AFTER_SECONDS:.0f} seconds",
    3: "killed on request",
}


class Stopper:
    """Turns SIGINT and SIGTERM of this process into an orderly end of the stage at work."""

    def __init__(self, log: EventLog) -> None:
        self.requests = 0
        self._log = log
        self._processes: Sequence[StageProcess] = ()
        self._kill_at = float("inf")
        self._former: dict[int, object] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._former[number] = signal.signal(number, self._request)
            # A process in the background starts with them held back, until somebody is there to take them.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def watch(self, processes: Sequence[StageProcess]) -> None:
        """From now on, requests go to these processes."""
        self._processes = processes
        self._kill_at = float("inf")

    def enforce(self) -> None:
        """Kill the stages when they have had their time after a second request."""
        if time.monotonic() > self._kill_at:
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send(number)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requests += 1
        with contextlib.suppress(OSError):  # a full disk must not keep a run from being stopped
            self._log.emit("message", level="info", text=_WORDS[min(self.requests, 3)], stop_requests=self.requests)
        self._send(signal.SIGINT if self.requests < 3 else signal.SIGKILL)
        if self.requests == 2:
            self._kill_at = time.monotonic() + KILL_AFTER_SECONDS
