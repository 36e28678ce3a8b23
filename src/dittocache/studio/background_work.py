"""Work on the cache that the Studio does itself: one thing at a time, the same in every tab."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec

from dittocache.errors import DittocacheError
from dittocache.events import EventLog, EventReader
from dittocache.studio.state import Studio

P = ParamSpec("P")

EVENTS_NAME = "work.jsonl"


@dataclass
class Work:
    """What is being done, or was done last.

    Attributes:
        title: what it is, in words.
        events: where it tells how far it is.
        running: whether it still goes on.
        done, total: records; both 0 where they are not counted.
        eta: seconds still to go.
        text: what it found.
        problem: why it failed; empty where it did not.
    """

    title: str
    events: Path
    running: bool = True
    done: float = 0
    total: float = 0
    eta: float = 0.0
    text: str = ""
    problem: str = ""
    _reader: EventReader = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._reader = EventReader(self.events)

    def poll(self) -> None:
        """Take in how far it is by now."""
        for event in self._reader.read():
            if event["kind"] == "progress":
                self.done, self.total, self.eta = event["done"], event["total"], event["eta"]


class BackgroundWork:
    """Does one piece of work at a time on the Studio's worker."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self.last: Work | None = None

    async def do(
        self, title: str, what: Callable[Concatenate[Studio, EventLog, P], str], *more: P.args, **options: P.kwargs
    ) -> bool:
        """Do it, and return when it is done; False at once where something else is still being done.

        Args:
            what: is given the Studio, a log for its progress, and `more`; says what came of it.
        """
        if self.last is not None and self.last.running:
            return False
        events = self._studio.home / EVENTS_NAME
        events.unlink(missing_ok=True)
        work = self.last = Work(title, events)
        log = EventLog(events, "studio")
        try:
            work.text = await self._studio.worker.run(what, self._studio, log, *more, **options)
        except DittocacheError as error:
            work.problem = str(error)
        except Exception as error:  # told in the page, and in full in the terminal
            work.problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            work.poll()
            work.running = False
        return True


def background_work(studio: Studio) -> BackgroundWork:
    """The work of this Studio."""
    found = studio.memory.setdefault("background_work", BackgroundWork(studio))
    assert isinstance(found, BackgroundWork)
    return found
