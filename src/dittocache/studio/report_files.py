"""Reports of runs for the browser: pages of our own making that may neither run scripts nor load anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from fastapi import Response
from fastapi.responses import FileResponse, PlainTextResponse

from dittocache.config import load_config
from dittocache.errors import AccessError, DittocacheError
from dittocache.events import EventLog, last_events
from dittocache.jobs.run_folder import CONFIG_NAME, EVENTS_NAME, LAST_EVENTS_BYTES, REPORT_NAME, WORKFLOW
from dittocache.studio.bundled import check_data
from dittocache.studio.state import Studio

REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'; sandbox"
)
"""Whatever stands in a report, it shows pictures that are part of it, and does nothing."""


@dataclass(frozen=True)
class RunReport:
    """The report of one run.

    Attributes:
        run_dir: the run's folder.
        written: seconds since the epoch; None where there is none yet.
        behind: whether the run has gone on since it was written.
    """

    run_dir: Path
    written: float | None
    behind: bool

    @property
    def file(self) -> Path:
        """Where it is, or would be."""
        return self.run_dir / REPORT_NAME


def run_reports(studio: Studio) -> list[RunReport]:
    """One for each run, those that changed last first; raises AccessError where runs are outside all roots."""
    found = []
    for file in studio.runs_dir.glob(f"*/{CONFIG_NAME}"):
        written, changed = _time(file.parent / REPORT_NAME), _time(file.parent / EVENTS_NAME)
        behind = written is not None and _went_on(file.parent / EVENTS_NAME, written)
        found.append((max(written or 0.0, changed or 0.0), RunReport(file.parent, written, behind)))
    return [report for _, report in sorted(found, key=lambda one: -one[0])]


def write_report(studio: Studio, run_dir: Path) -> None:
    """Write the report of a run as it stands, also while it is at work. Run it on the worker: it needs torch.

    Not as a stage of the run, which would become the last thing that the run did. Raises AccessError where its data set
    is outside the allowed folders, StageError where there is nothing to report, and what reading the data set raises.
    """
    from dittocache.jobs.inputs import RunInputs
    from dittocache.jobs.reporting import report

    folder = studio.path(run_dir)
    config = load_config(folder / CONFIG_NAME)
    check_data(studio, config)
    report(RunInputs(config, folder), EventLog(Path(os.devnull), "report"))


def report_url(report: RunReport) -> str:
    """Where the browser finds it; another address once it was written anew."""
    return "/report?" + urlencode({"path": os.fspath(report.file), "version": f"{report.written or 0:.3f}"})


def endpoints(studio: Studio) -> dict[str, Callable[..., Response]]:
    """What answers these addresses. Only reports inside the allowed folders are served."""

    def report(path: str, version: str = "") -> Response:
        try:
            file = studio.path(path)
        except AccessError as error:
            return PlainTextResponse(f"{error}\n", status_code=403)
        if file.name != REPORT_NAME or not file.is_file():
            return PlainTextResponse("There is no such report any more; write it again on page Reports.\n", 404)
        headers = {"Content-Security-Policy": REPORT_POLICY, "Cache-Control": "no-cache"}
        return FileResponse(file, media_type="text/html", headers=headers)

    return {"/report": report}


def reports_or_problem(studio: Studio) -> tuple[list[RunReport], str]:
    """The reports, and why there are none where the folder of runs cannot be read."""
    try:
        return run_reports(studio), ""
    except (OSError, DittocacheError) as error:
        return [], str(error)


def _went_on(events: Path, since: float) -> bool:
    """Whether another stage than the report's own has said something since."""
    own = ("report", WORKFLOW)
    said = last_events(events, LAST_EVENTS_BYTES)
    return any(event["time"] > since and event["stage"] not in own for event in said)


def _time(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None
