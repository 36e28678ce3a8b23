"""Work on the cache that the Studio does itself: one thing at a time, the same in every tab."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dittocache.errors import DittocacheError
from dittocache.events import Event, EventLog
from dittocache.studio.state import Studio


@dataclass
class Work:
    """What is being done, or was done last.

    Attributes:
        title: what it is, in words.
        running: whether it still goes on.
        done, total: records; both 0 where they are not counted.
        eta: seconds still to go.
        text: what it found.
        problem: why it failed; empty where it did not.
    """

    title: str
    running: bool = True
    done: int = 0
    total: int = 0
    eta: float = 0.0
    text: str = ""
    problem: str = ""

    def note(self, event: Event) -> None:
        """Take in an event of the work's log."""
        if event["kind"] == "progress":
            self.done, self.total, self.eta = event["done"], event["total"], event["eta"]


class BackgroundWork:
    """Runs one piece of work at a time in a thread."""

    def __init__(self) -> None:
        self.last: Work | None = None
        self._lock = threading.Lock()

    def start(self, title: str, what: Callable[[EventLog], str]) -> Work | None:
        """Begin; None where something is still being done. `what` is given a log for its progress, and says what came
        of it."""
        with self._lock:
            if self.last is not None and self.last.running:
                return None
            work = self.last = Work(title)
        threading.Thread(target=_do, args=(work, what), name="studio-work", daemon=True).start()
        return work


def background_work(studio: Studio) -> BackgroundWork:
    """The work of this Studio."""
    found = studio.memory.setdefault("background_work", BackgroundWork())
    assert isinstance(found, BackgroundWork)
    return found


def _do(work: Work, what: Callable[[EventLog], str]) -> None:
    try:
        work.text = what(EventLog(Path(os.devnull), "studio", work.note))
    except DittocacheError as error:
        work.problem = str(error)
    except Exception as error:  # told to the user, and in full to the terminal
        traceback.print_exc()
        work.problem = f"{type(error).__name__}: {error}"
    finally:
        work.running = False
