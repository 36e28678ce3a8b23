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


def run_at_work(studio: Studio) -> Path | None:
    """The run that is at work, of several the one that said something last; None where none is."""
    working = {run: began for run, began in _begun_runs(studio).items() if is_locked(run)}
    return max(working, key=working.__getitem__, default=None)


def run_to_show(studio: Studio, asked: str = "", showing: Path | None = None) -> Path | None:
    """The run of this name; else the one at work, the newest of several; else what is shown; else the draft's own.

    Args:
        asked: name of a run's folder.
        showing: what the page shows; it stays while it is at work.
    """
    if showing is not None and (asked or is_locked(showing)):
        return showing
    if asked:
        try:
            found = studio.path(studio.runs_dir / asked)
        except AccessError:
            return None
        return found if (found / EVENTS_NAME).is_file() else None
    own = folder_of_run(studio)
    return run_at_work(studio) or showing or (own if own in _begun_runs(studio) else None)


def _begun_runs(studio: Studio) -> dict[Path, float]:
    """Folders of runs that have said something, and when they said the last."""
    try:
        return {
            run: events.stat().st_mtime for run in _folders(studio.runs_dir) if (events := run / EVENTS_NAME).is_file()
        }
    except (AccessError, OSError):
        return {}


def _folders(runs: Path) -> list[Path]:
    try:
        return [path for path in runs.iterdir() if path.is_dir()]
    except OSError:
        return []
