"""Which run a page shows."""

from __future__ import annotations

from pathlib import Path

from dittocache.config import RunConfig
from dittocache.errors import AccessError
from dittocache.jobs.run_folder import EVENTS_NAME, is_locked
from dittocache.studio.state import Studio


def folder_of_run(studio: Studio) -> Path | None:
    """The folder that the draft's run has or will have; None where that is outside the allowed folders."""
    name = str(studio.draft.given.get("name") or RunConfig.model_fields["name"].default)
    try:
        return studio.path(studio.runs_dir / name)
    except AccessError:
        return None


def run_to_show(studio: Studio, asked: str = "", showing: Path | None = None) -> Path | None:
    """The run of this name; else the one at work, the newest of several; else the draft's own; else what is shown.

    Args:
        asked: name of a run's folder.
        showing: what the page shows; it stays while it is at work.
    """
    if showing is not None and (asked or is_locked(showing)):
        return showing
    try:
        runs = studio.runs_dir
        if asked:
            found = studio.path(runs / asked)
            return found if (found / EVENTS_NAME).is_file() else None
    except AccessError:
        return None
    began = {run: events.stat().st_mtime for run in _folders(runs) if (events := run / EVENTS_NAME).is_file()}
    working = [run for run in began if is_locked(run)]
    if working:
        return max(working, key=began.__getitem__)
    if showing is not None:
        return showing
    own = folder_of_run(studio)
    return own if own in began else None


def _folders(runs: Path) -> list[Path]:
    try:
        return [path for path in runs.iterdir() if path.is_dir()]
    except OSError:
        return []
