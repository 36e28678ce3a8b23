"""The pictures that were made on page *Generate*: the one at work or chosen, and those before it."""

from __future__ import annotations

import shutil
from pathlib import Path

from nicegui import run, ui

from dittocache.errors import DittocacheError
from dittocache.jobs.background.stopping import stop_run
from dittocache.jobs.following.follower import RunFollower
from dittocache.jobs.following.view import RunView
from dittocache.jobs.run_folder import is_locked
from dittocache.quality.units import seconds_text
from dittocache.studio.layout import problems_list
from dittocache.studio.parts.comparison import comparison
from dittocache.studio.picture_request import STAGES, made_pictures
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio
from dittocache.studio.thumbnails import thumbnail_url


class MadePictures:
    """Follows the folders of pictures, so that every tab shows the same, whoever asked for them."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._folders: list[Path] = []
        self._follower: RunFollower | None = None
        self._shown: RunView | None = None
        self._work = ui.element("div").classes("stack")
        with self._work:
            self._said = ui.label().props("aria-live=polite").mark("picture-state")
            with ui.element("div").classes("line nowrap"):
                self._bar = ui.linear_progress(0, show_value=False, size="10px").classes("grow")
                self._bar.props('aria-label="Progress"')
                self._cancel = ui.button("Cancel", icon="stop", on_click=self._stop).props("outline dense no-caps")
        self._result = ui.element("div").classes("stack").mark("comparison")
        self._list = ui.element("div").classes("made").props('role=list aria-label="Earlier pictures"')
        self._remove = ui.button("Delete this picture", icon="delete", on_click=self._delete)
        self._remove.props("flat dense no-caps")
        self._look()
        ui.timer(0.5, self._look)

    def show(self, folder: Path) -> None:
        """Follow the picture in this folder."""
        self._follower, self._shown = RunFollower(folder), None
        self._look()

    def _look(self) -> None:
        folders = made_pictures(self._studio)
        if folders != self._folders:
            newest_is_new = folders[:1] != self._folders[:1]
            shown_is_gone = self._follower is not None and self._follower.run_dir in set(self._folders) - set(folders)
            self._folders = folders
            if newest_is_new or shown_is_gone:
                self._follower = RunFollower(folders[0]) if folders else None
                self._shown = None
            self._list_all()
        if self._follower is None:
            self._say_nothing_yet()
            return
        self._follower.poll()
        view = self._follower.view()
        if view != self._shown:
            if self._shown is not None and view.samples != self._shown.samples:
                self._list_all()
            self._show(self._follower.run_dir, view)

    def _say_nothing_yet(self) -> None:
        self._said.set_text("Nothing made yet. Choose a picture, say what to do with it, and make one.")
        self._bar.set_visibility(False)
        self._cancel.set_visibility(False)
        self._remove.set_visibility(False)
        self._result.clear()

    def _show(self, folder: Path, view: RunView) -> None:
        compared = view.results.get(STAGES[0], {}).get("compared")
        before = self._shown.results.get(STAGES[0], {}).get("compared") if self._shown is not None else None
        self._said.set_text(_words(view))
        stage = view.stage
        running = view.state == "running"
        self._bar.set_visibility(running)
        self._bar.set_value(stage.fraction if stage is not None else 0)
        self._cancel.set_visibility(running)
        self._remove.set_visibility(view.state not in ("running", "new"))
        if self._shown is None or compared != before or view.failure != self._shown.failure:
            self._result.clear()
            with self._result:
                _show_failure(view)
                for row in compared or ():
                    comparison(folder, row)
                    ui.label(shown(row["caption"], 1000)).classes("muted wrap")
        self._shown = view

    def _list_all(self) -> None:
        self._list.clear()
        with self._list:
            for folder in self._folders:
                self._tile(folder)

    def _tile(self, folder: Path) -> None:
        follower = RunFollower(folder)
        follower.poll()
        samples = follower.view().samples
        here = self._follower is not None and self._follower.run_dir == folder
        with ui.element("button").classes("here" if here else "").on("click", lambda: self._choose(folder)) as tile:
            caption = shown(samples[-1].caption, 80) if samples else "no picture"
            tile.props["aria-label"] = f"Show {caption}"
            if samples:
                picture = ui.element("img")
                picture.props["src"] = thumbnail_url(folder / samples[-1].picture, 96)
                picture.props["alt"] = ""
            ui.label(caption).classes("small muted made-prompt")

    def _choose(self, folder: Path) -> None:
        self.show(folder)
        self._list_all()

    async def _stop(self) -> None:
        if self._follower is None:
            return
        try:
            await run.io_bound(stop_run, self._follower.run_dir)
        except DittocacheError as error:
            ui.notify(shown(error, 500), type="negative")

    async def _delete(self) -> None:
        folder = self._follower.run_dir if self._follower is not None else None
        if folder is None or folder not in made_pictures(self._studio) or is_locked(folder):
            return
        await run.io_bound(shutil.rmtree, folder, True)
        self._look()


def _words(view: RunView) -> str:
    """How the picture stands, in a line."""
    stage = view.stage
    if view.state == "running":
        if view.stop_requests:
            return "Stopping …"
        if stage is None or not stage.done:
            return "Loading the model …"
        left = f", about {seconds_text(stage.eta)} left" if stage.eta else ""
        return f"Step {stage.done:.0f} of {stage.total:.0f}{left}"
    return {
        "new": "Waiting for the device; it begins by itself",
        "finished": "Done",
        "stopped": "Cancelled",
        "failed": "It could not be made",
        "died": "Its process ended without a word",
    }.get(view.state, "")


def _show_failure(view: RunView) -> None:
    if view.failure is None or view.state == "stopped":
        return
    lines = [line for line in (view.failure.error, view.failure.hint) if line]
    problems_list(lines, "The picture could not be made")
    if view.failure.log_tail:
        ui.label(shown(view.failure.log_tail, 4000)).classes("log mono small")
