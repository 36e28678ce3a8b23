"""The button that ends a run: in good order first, at once when pressed again."""

from __future__ import annotations

from pathlib import Path

from nicegui import run, ui

from dittocache.jobs.background.stopping import kill_run, stop_run
from dittocache.jobs.following.view import RunView
from dittocache.studio.layout import telling_errors


def stop_button(run_dir: Path, view: RunView) -> None:
    """A button for a run that is at work, as its view says."""
    words, icon = ("Stop", "stop") if view.stop_requests == 0 else ("End at once", "dangerous")

    async def end() -> None:
        with telling_errors():
            await run.io_bound(kill_run if view.stop_requests > 1 else stop_run, run_dir)

    button = ui.button(words, icon=icon, on_click=end).props("outline no-caps color=negative")
    with button:
        ui.tooltip(
            "Finish the step, save, end" if view.stop_requests == 0 else "End without finishing; what is saved stays"
        )
