"""What page *Runs* does with the folders of runs, inside the Studio's own only."""

from __future__ import annotations

from pathlib import Path

from dittocache.errors import AccessError
from dittocache.jobs.following import history
from dittocache.jobs.following.history import RunSummary, compare_losses
from dittocache.jobs.run_folder import LORA_NAME, REPORT_NAME
from dittocache.studio.state import Studio

CAN_GO_ON = frozenset({"stopped", "failed", "died"})
"""States of runs that resuming makes sense for."""

Curves = dict[str, tuple[tuple[int, float], ...]]


class LossCurves:
    """Loss curves of chosen runs; those that did not change are not read again."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, Curves]] = {}

    def of(self, runs: list[RunSummary]) -> Curves:
        """Run name -> (step, loss) points; runs without losses are left out."""
        found: Curves = {}
        for run in runs:
            mark = (run.started, run.step, run.loss)
            known = self._known.get(run.run_dir)
            if known is None or known[0] != mark:
                known = self._known[run.run_dir] = (mark, compare_losses([run.run_dir]))
            found |= known[1]
        return found


def all_runs(studio: Studio) -> list[RunSummary]:
    """Those that were started last first; raises AccessError where the folder of runs is outside all roots."""
    return history.list_runs(studio.runs_dir)


def delete_run(studio: Studio, name: str) -> None:
    """Delete a run's folder for good. What it cached stays, for others and for garbage collection.

    Raises AccessError for a name that leads out of the folder of runs, StageError for a run at work, or none at all.
    """
    runs = studio.runs_dir
    folder = studio.path(runs / name)
    if folder.parent != runs:
        raise AccessError(f"{name!r} is no run in {runs}; nothing was deleted")
    history.delete_run(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, links not followed."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def leads(run: RunSummary) -> tuple[bool, bool]:
    """Whether the run has a LoRA, and a report."""
    return (run.run_dir / LORA_NAME).is_dir(), (run.run_dir / REPORT_NAME).is_file()
