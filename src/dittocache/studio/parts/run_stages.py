"""The stages of a run, one line each: what it does, how far it is, what it found."""

from __future__ import annotations

from nicegui import ui

from dittocache.jobs.following.view import RunView, StageView
from dittocache.studio.shown import shown
from dittocache.studio.words import byte_count, duration, pace

ICONS = {
    "waiting": ("radio_button_unchecked", "muted"),
    "running": ("play_circle", "accent"),
    "finished": ("check_circle", "good"),
    "reused": ("bolt", "good"),
    "failed": ("error", "bad"),
    "stopped": ("pause_circle", "warn"),
    "died": ("error", "bad"),
}
"""State of a stage -> its icon and colour."""


class RunStages:
    """A list that is built anew when other stages stand in it, and otherwise only changed."""

    def __init__(self) -> None:
        self._list = ui.element("ol").classes("stages").props('aria-label="Stages"')
        self._rows: dict[str, _Row] = {}

    def show(self, view: RunView) -> None:
        """Show the stages of this view."""
        names = [stage.name for stage in view.stages]
        if names != list(self._rows):
            self._list.clear()
            with self._list:
                self._rows = {stage.name: _Row(stage) for stage in view.stages}
        for stage in view.stages:
            self._rows[stage.name].show(stage)


class _Row:
    def __init__(self, stage: StageView) -> None:
        with ui.element("li").classes("stage") as row:
            row.props["data-stage"] = stage.name
            self._icon = ui.icon("radio_button_unchecked")
            with ui.element("div").classes("grow"):
                with ui.element("div").classes("line stage-line"):
                    ui.label(stage.title).classes("stage-title")
                    self._words = ui.label().classes("muted small")
                self._bar = ui.linear_progress(0, show_value=False).props("rounded size=6px").classes("stage-bar")
        self._row = row

    def show(self, stage: StageView) -> None:
        """Show the stage as it is now."""
        icon, colour = ICONS[stage.state]
        self._icon.set_name(icon)
        self._icon.classes(replace=colour)
        self._row.props["data-state"] = stage.state
        self._row.update()
        self._words.set_text(stage_words(stage))
        self._bar.set_value(stage.fraction)
        self._bar.set_visibility(stage.state == "running")


def stage_words(stage: StageView) -> str:
    """What to say of a stage in one line."""
    if stage.state == "waiting":
        return "waiting"
    if stage.state == "running":
        if not stage.total:
            return "starting"
        words = [f"{stage.done:,.0f} of {stage.total:,.0f}"]
        if stage.speed > 0:
            words += [pace(stage.speed, "step" if stage.name == "train" else "item"), f"{duration(stage.eta)} left"]
        if stage.written_bytes:
            words.append(f"{byte_count(stage.written_bytes)} written")
        return ", ".join(words)
    said = [shown(one, 200) for one in stage.outcome]
    if stage.state == "reused":
        said = ["everything was cached", *said]
    elif stage.seconds is not None:
        said.append(f"{stage.state} after {duration(stage.seconds)}")
    return "; ".join(said)
