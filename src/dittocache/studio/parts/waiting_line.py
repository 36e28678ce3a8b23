"""The runs that wait in line for a device, and those that could not be started."""

from __future__ import annotations

from nicegui import run, ui

from dittocache.errors import DittocacheError
from dittocache.jobs.queue.folder import QueueEntry
from dittocache.studio.layout import card
from dittocache.studio.shown import shown
from dittocache.studio.training import leave_line, waiting_jobs

POLL_SECONDS = 2.0


class WaitingLine:
    """A card that is hidden while nothing waits."""

    def __init__(self) -> None:
        self._entries: list[QueueEntry] = []
        with card("In line", "These begin by themselves, one after the other on each device.") as self._card:
            self._list = ui.element("div").classes("stack")
        self._card.set_visibility(False)
        ui.timer(POLL_SECONDS, self.poll)

    async def poll(self) -> None:
        """Show what waits now."""
        try:
            entries = await run.io_bound(waiting_jobs)
        except DittocacheError as error:
            ui.notify(shown(error, 500), type="negative")
            return
        if entries is None or entries == self._entries or self._list.is_deleted:
            return
        self._entries = entries
        self._card.set_visibility(bool(entries))
        self._list.clear()
        with self._list:
            for entry in entries:
                self._row(entry)

    def _row(self, entry: QueueEntry) -> None:
        with ui.element("div").classes("line"):
            ui.label(shown(entry.job.run_dir.name)).classes("mono")
            what = f"waits for {', '.join(entry.job.devices)}" if entry.state == "waiting" else "could not be started"
            ui.label(f"{what} {shown(entry.detail, 500)}".strip()).classes("muted grow wrap")
            label = "Leave the line" if entry.state == "waiting" else "Take off the list"
            ui.button(label, on_click=lambda: self._leave(entry.job.number)).props("flat dense no-caps")

    async def _leave(self, number: int) -> None:
        try:
            await run.io_bound(leave_line, number)
        except DittocacheError as error:
            ui.notify(shown(error, 500), type="negative")
        await self.poll()
