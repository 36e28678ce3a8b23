"""Page *Reports*: what each run found, on a page of its own, shown here or alone."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from nicegui import ui

from dittocache.errors import DittocacheError
from dittocache.studio.layout import card, heading, problems_list
from dittocache.studio.report_files import RunReport, report_url, reports_or_problem, write_report
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio


def page(studio: Studio) -> None:
    """Build the page; `?open=NAME` shows the report of that run at once."""
    heading("Reports", "Losses, pictures before and after, and what each cache saved and changed.")
    request = ui.context.client.request
    _Reports(studio, request.query_params.get("open", "") if request is not None else "")


class _Reports:
    """The list of reports, and the one that is open."""

    def __init__(self, studio: Studio, opened: str) -> None:
        self._studio = studio
        self._opened = opened
        self._shown: list[RunReport] | None = None
        self._writing: set[Path] = set()
        with card():
            self._entries = ui.element("div").classes("entries").mark("reports")
        self._frame = ui.element("div").classes("stack")
        self._look()
        ui.timer(1.0, self._look)

    def _look(self) -> None:
        found, problem = reports_or_problem(self._studio)
        if found == self._shown:
            return
        self._shown = found
        self._entries.clear()
        with self._entries:
            if problem:
                problems_list([problem], "The runs cannot be read")
            elif not found:
                ui.label("No run yet. Every run that you start on page Train has a report here.").classes("muted")
            for report in found:
                self._entry(report)
        self._open(next((one for one in found if one.run_dir.name == self._opened), None))

    def _entry(self, report: RunReport) -> None:
        name = shown(report.run_dir.name)
        with ui.element("div").classes("entry"):
            with ui.element("div").classes("grow"):
                ui.label(name).classes("entry-name")
                ui.label(_when(report)).classes("muted small")
            if report.written is not None:
                ui.button("Open", icon="visibility", on_click=lambda: self._choose(report)).props(
                    f'unelevated dense no-caps aria-label="Open the report of {name}"'
                )
                with ui.link(target=report_url(report), new_tab=True).classes("small"):
                    ui.label("alone in a tab")
            at_work = report.run_dir in self._writing
            label = "Writing …" if at_work else "Write it again" if report.written is not None else "Write a report"
            button = ui.button(label, icon="edit_note", on_click=lambda: self._write(report))
            button.props(f'flat dense no-caps aria-label="{label}: {name}"').set_enabled(not at_work)

    def _choose(self, report: RunReport) -> None:
        self._opened = report.run_dir.name
        self._open(report)

    def _open(self, report: RunReport | None) -> None:
        self._frame.clear()
        if report is None or report.written is None:
            return
        with self._frame:
            frame = ui.element("iframe").classes("report-frame")
            frame.props["src"] = report_url(report)
            frame.props["sandbox"] = ""
            frame.props["title"] = f"Report of {shown(report.run_dir.name)}"

    async def _write(self, report: RunReport) -> None:
        self._writing.add(report.run_dir)
        self._show_again()
        try:
            await self._studio.worker.run(write_report, self._studio, report.run_dir)
            self._opened = report.run_dir.name
        except DittocacheError as error:
            ui.notify(f"No report was written: {shown(error, 500)}", type="negative", multi_line=True)
        finally:
            self._writing.discard(report.run_dir)
        self._show_again()

    def _show_again(self) -> None:
        self._shown = None
        if not self._entries.is_deleted:
            self._look()


def _when(report: RunReport) -> str:
    if report.written is None:
        return "no report yet"
    written = datetime.fromtimestamp(report.written).strftime("written %d %B %Y, %H:%M")
    return f"{written}; the run has gone on since" if report.behind else written
