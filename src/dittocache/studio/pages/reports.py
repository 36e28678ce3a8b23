"""Page *Reports*: what each run found, on a page of its own, shown here or alone."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from nicegui import run, ui

from dittocache.config import load_config
from dittocache.errors import DittocacheError
from dittocache.jobs.background.starting import start_run
from dittocache.jobs.following.follower import RunFollower
from dittocache.jobs.run_folder import CONFIG_NAME, is_locked
from dittocache.studio.layout import card, heading, problems_list
from dittocache.studio.report_files import RunReport, report_url, reports_or_problem
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio

STAGES = ("report",)


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
        self._writing: dict[Path, RunFollower] = {}
        with card():
            self._entries = ui.element("div").classes("entries").mark("reports")
        self._frame = ui.element("div").classes("stack")
        self._look()
        ui.timer(1.0, self._look)

    def _look(self) -> None:
        for run_dir in [folder for folder in self._writing if not is_locked(folder)]:
            follower = self._writing.pop(run_dir)
            follower.poll()
            failure = follower.view().failure
            if failure is not None:
                ui.notify(shown(f"No report was written: {failure.error} {failure.hint}", 500), type="negative")
            else:
                self._opened = run_dir.name
            self._shown = None
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
        try:
            config = await run.io_bound(load_config, report.run_dir / CONFIG_NAME)
            config = config.model_copy(update={"output_dir": report.run_dir.parent, "name": report.run_dir.name})
            await run.io_bound(start_run, config, STAGES, cwd=self._studio.base)
        except DittocacheError as error:
            ui.notify(shown(error, 500), type="negative", multi_line=True)
            return
        self._writing[report.run_dir] = RunFollower(report.run_dir)
        self._shown = None
        self._look()


def _when(report: RunReport) -> str:
    if report.written is None:
        return "no report yet"
    written = datetime.fromtimestamp(report.written).strftime("written %d %B %Y, %H:%M")
    return f"{written}; the run has gone on since" if report.behind else written
