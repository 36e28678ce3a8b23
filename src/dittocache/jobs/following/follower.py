"""Follows one run for a page: new events, what they come to, the log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dittocache.events import Event, EventReader
from dittocache.jobs.failures import last_lines
from dittocache.jobs.following.fold import RunFold
from dittocache.jobs.following.view import RunView
from dittocache.jobs.run_folder import EVENTS_NAME, LOG_NAME, is_locked

LOG_TAIL_LINES = 12
LOG_BYTES = 2**16


class RunFollower:
    """Follows the run in a folder, which need not exist yet. Cheap to make, cheap to poll; one for each page.

    The view depends on the folder alone: two followers of one run show the same, whenever they were made.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._begin()

    def _begin(self) -> None:
        self._reader = EventReader(self.run_dir / EVENTS_NAME)
        self._fold = RunFold()

    def poll(self) -> list[Event]:
        """Take in what came since the last poll, and return it."""
        events = list(self._reader.read())
        if self._reader.restarts:  # another stream in the place of the one that was read
            self._begin()
            events = list(self._reader.read())
        for event in events:
            self._fold.add(event)
        return events

    def view(self) -> RunView:
        """The run as of the last poll, with its state as of now."""
        live = is_locked(self.run_dir)
        if not live:
            self.poll()  # what a run says last is said before it lets go of its folder
        view = self._fold.view(live)
        if view.failure is None or view.failure.returncode == 2:  # settings at fault: the error lists all there is
            return view
        return replace(view, failure=replace(view.failure, log_tail=log_tail(self.run_dir, LOG_TAIL_LINES)))


def log_tail(run_dir: Path, lines: int = 200) -> str:
    """The last lines of a run's log, at most 64 KiB of it; empty where there is none."""
    try:
        with (run_dir / LOG_NAME).open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - LOG_BYTES))
            return last_lines(stream.read().decode(errors="replace"), lines)
    except OSError:
        return ""
