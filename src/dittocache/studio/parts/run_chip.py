"""The run at work, in the header of every page: its name, how far it is, and the way to it."""

from __future__ import annotations

from urllib.parse import quote

from nicegui import run, ui

from dittocache.jobs.following.follower import RunFollower
from dittocache.jobs.following.view import RunView
from dittocache.studio.run_choice import run_at_work
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio

POLL_SECONDS = 3.0


class RunChip:
    """A link that is hidden while nothing runs."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._follower: RunFollower | None = None
        with ui.link(target="/train").classes("run-chip") as self._link:
            ui.icon("play_circle")
            self._words = ui.label()
        self._link.set_visibility(False)
        ui.timer(POLL_SECONDS, self._poll)

    async def _poll(self) -> None:
        view = await run.io_bound(self._look)
        if self._link.is_deleted:
            return
        self._link.set_visibility(view is not None)
        if view is None or self._follower is None:
            return
        name = self._follower.run_dir.name
        self._link.props["href"] = f"/train?run={quote(name)}"
        stage = view.stage
        share = f" {stage.fraction:.0%}" if stage is not None and stage.total else ""
        self._words.set_text(f"{shown(name, 24)}{share}")

    def _look(self) -> RunView | None:
        run_dir = run_at_work(self._studio)
        if run_dir is None:
            self._follower = None
            return None
        if self._follower is None or self._follower.run_dir != run_dir:
            self._follower = RunFollower(run_dir)
        self._follower.poll()
        return self._follower.view()
