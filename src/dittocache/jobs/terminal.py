"""Shows a run in the terminal: a line a stage, a progress bar with speed and ETA where there is a screen.

Where there is none (a file, a pipe), a line a minute says how far the stage is.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from dittocache.events import Event, number_in
from dittocache.jobs.results import describe_result
from dittocache.jobs.run_folder import WORKFLOW
from dittocache.jobs.stages import STAGES

SECONDS_A_LINE = 60.0
"""Time between two lines of progress where there is no screen."""

_LEVEL_STYLES = {"info": "dim", "warning": "yellow", "error": "red"}


class TerminalListener:
    """Give an instance to `run_workflow` as its listener; use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._next_line = float("inf")
        self._loss = ""
        self._outcome: list[str] = []

    def __enter__(self) -> TerminalListener:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        if event["stage"] == WORKFLOW:
            return
        kind = event["kind"]
        if kind == "stage_started":
            self._outcome, self._loss = [], ""
            self._next_line = event["time"] + SECONDS_A_LINE
            if event["command"]:
                self.console.print(f"{_title(event['stage'])} ...", markup=False)
        elif kind == "progress":
            self._advance(event)
        elif kind == "metric":
            loss = number_in(event, "loss")
            self._loss = f"loss {loss:.4f}, " if loss is not None else ""
        elif kind == "message":
            style = _LEVEL_STYLES[event["level"]]
            self.console.print(_indented(event["text"]), style=style, markup=False, soft_wrap=True)
        elif kind == "result":
            self._outcome += describe_result(event)
        elif kind in ("stage_finished", "stage_failed"):
            self._end(event)

    def _advance(self, event: Event) -> None:
        speed = f"{self._loss}{event['speed']:.1f}/s, {_duration(event['eta'])} left"
        if not self.console.is_terminal:
            self._next_line = min(self._next_line, event["time"] + SECONDS_A_LINE)
            if event["time"] >= self._next_line and event["done"] < event["total"]:
                self._next_line = event["time"] + SECONDS_A_LINE
                self.console.print(f"  {event['done']} of {event['total']}: {speed}", markup=False, soft_wrap=True)
            return
        if self._task is None:
            self._task = self._progress.add_task(_title(event["stage"]), total=event["total"], speed=speed)
        self._progress.update(self._task, completed=event["done"], total=event["total"], speed=speed)

    def _end(self, event: Event) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        if event["kind"] == "stage_failed":
            return  # the error itself is printed by whoever started the run
        outcome = "; ".join(self._outcome)
        seconds = f" in {_duration(event['seconds'])}" if event["seconds"] >= 0.05 else ""
        title = f"{_title(event['stage'])}: " if not seconds else "  done: " if outcome else "  done"
        self.console.print(f"{title}{outcome}{seconds}", markup=False, style="green", soft_wrap=True)


def _title(stage: str) -> str:
    return STAGES[stage].title if stage in STAGES else stage


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02} min"
