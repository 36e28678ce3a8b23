"""One run as it goes: stages, numbers, loss curve, pictures, log. Read from the run's folder, so every tab shows the
same, whenever it was opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nicegui import run, ui

from dittocache.jobs.following.follower import RunFollower, log_tail
from dittocache.jobs.following.view import RunView
from dittocache.studio.parts.loss_chart import LossChart
from dittocache.studio.parts.run_pictures import RunPictures
from dittocache.studio.parts.run_stages import RunStages
from dittocache.studio.parts.tables import numbers
from dittocache.studio.shown import shown
from dittocache.studio.words import byte_count, duration, moment, pace

POLL_SECONDS = 1.0
LOG_LINES = 200

STATES = {
    "new": ("Waiting to begin", "muted"),
    "running": ("Running", "accent"),
    "finished": ("Finished", "good"),
    "stopped": ("Stopped", "warn"),
    "failed": ("Failed", "bad"),
    "died": ("Ended without a word", "bad"),
}
"""State of a run -> what the page calls it, and its colour."""


class LiveRun:
    """What a page shows of the run in a folder.

    Args:
        controls: builds the buttons beside the run's name, from its latest view; called when its state changes.
        brief: whether only stages and failures are shown.
    """

    def __init__(self, controls: Callable[[Path, RunView], None], brief: bool = False) -> None:
        self._controls = controls
        self._run_dir: Path | None = None
        self._follower: RunFollower | None = None
        self._view = RunView()
        self._polling = False
        self._log = ""
        with ui.element("section").classes("card live-run").props('aria-label="Run"') as self._card:
            with ui.element("div").classes("line"):
                self._name = ui.label().classes("card-title mono wrap")
                self._state = ui.label().classes("badge").props("role=status")
                self._when = ui.label().classes("muted small grow")
                self._buttons = ui.element("div").classes("line shrink")
            self._failure = ui.element("div").classes("problems").props("role=alert")
            self._stages = RunStages()
            with ui.element("div").classes("stack") as details:
                self._numbers = ui.element("div").classes("full")
                self._losses = LossChart()
                self._pictures = RunPictures()
            with ui.expansion("Messages and log", value=not brief).classes("settings-group"):
                self._messages = ui.label().classes("log mono messages")
                self._text = ui.label().classes("log mono run-log")
        details.set_visibility(not brief)
        self._card.set_visibility(False)
        ui.timer(POLL_SECONDS, self._poll)

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run that is shown."""
        return self._run_dir

    async def show(self, run_dir: Path | None) -> None:
        """Show the run in another folder; none for None."""
        if run_dir == self._run_dir:
            return
        self._run_dir = run_dir
        self._follower = RunFollower(run_dir) if run_dir is not None else None
        self._view, self._log = RunView(), ""
        self._card.set_visibility(run_dir is not None)
        self._name.set_text(shown(run_dir.name) if run_dir is not None else "")
        await self._poll()

    async def _poll(self) -> None:
        follower = self._follower
        if follower is None or self._polling:
            return
        self._polling = True
        try:
            found = await run.io_bound(_look, follower)
        finally:
            self._polling = False
        if found is None or follower is not self._follower:  # the Studio is ending, or another run is shown by now
            return
        view, log = found
        if view != self._view:
            self._show(follower.run_dir, view)
        if log != self._log:
            self._log = log
            self._text.set_text(log)
            _scroll_down(self._text)
        self._text.set_visibility(bool(log))

    def _show(self, run_dir: Path, view: RunView) -> None:
        former, self._view = self._view, view
        words, colour = STATES[view.state]
        if view.state == "running" and view.stop_requests:
            words = "Stopping: the step is finished and saved" if view.stop_requests == 1 else "Ending now"
        self._state.set_text(words)
        self._state.classes(replace=f"badge {colour}")
        self._when.set_text(f"started {moment(view.started)}" if view.started is not None else "")
        if (view.state, view.stop_requests) != (former.state, former.stop_requests) or not list(self._buttons):
            self._buttons.clear()
            with self._buttons:
                self._controls(run_dir, view)
        self._show_failure(view)
        self._stages.show(view)
        self._show_numbers(view)
        if view.losses != former.losses:
            self._losses.show(view.losses)
        if view.samples != former.samples:
            self._pictures.show(run_dir, view.samples)
        if view.messages != former.messages or not view.messages:
            lines = [f"{one.level}: {one.text}" if one.level != "info" else one.text for one in view.messages]
            self._messages.set_text("\n".join(lines))
            self._messages.set_visibility(bool(lines))
            _scroll_down(self._messages)

    def _show_failure(self, view: RunView) -> None:
        failure = view.failure
        self._failure.set_visibility(failure is not None)
        self._failure.clear()
        if failure is None:
            return
        with self._failure:
            title = "The run is gone" if view.state == "died" else f"Stage {failure.stage} failed"
            ui.label(title).classes("problems-title")
            ui.label(failure.error).classes("wrap pre")
            if failure.hint:
                ui.label(f"Hint: {failure.hint}").classes("wrap pre")
            if failure.log_tail:
                ui.label(failure.log_tail).classes("log mono")

    def _show_numbers(self, view: RunView) -> None:
        found = _numbers(view)
        self._numbers.clear()
        with self._numbers:
            numbers(found)
        self._numbers.set_visibility(bool(found))


def _look(follower: RunFollower) -> tuple[RunView, str]:
    follower.poll()
    return follower.view(), log_tail(follower.run_dir, LOG_LINES)


def _numbers(view: RunView) -> list[tuple[str, str]]:
    """What is worth reading at a glance, as name and value."""
    found: list[tuple[str, str]] = []
    metrics, stage = view.metrics, view.stage
    if "step" in metrics:
        found.append(("Step", f"{metrics['step']:.0f}"))
    if "loss" in metrics:
        found.append(("Loss", f"{metrics['loss']:.4f}"))
    if "learning_rate" in metrics:
        found.append(("Learning rate", f"{metrics['learning_rate']:.2e}"))
    if view.state == "running" and stage is not None and stage.total:
        found.append(("Speed", pace(stage.speed, "step" if stage.name == "train" else "item")))
        found.append(("Left in this stage", duration(stage.eta)))
    for one in view.memory:
        found.append((f"Memory, {one.device}", f"{byte_count(one.used)} of {byte_count(one.total)}"))
    return [(name, value) for name, value in found if value]


def _scroll_down(element: ui.element) -> None:
    found = f"const log = getHtmlElement({element.id})"
    ui.run_javascript(f"requestAnimationFrame(() => {{ {found}; if (log) log.scrollTop = log.scrollHeight }})")
