"""Every run there is, for page *Runs*: how it stands, how long it took, its losses; and how one is deleted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dittocache.errors import AccessError
from dittocache.jobs.following.follower import RunFollower
from dittocache.jobs.run_folder import EVENTS_NAME, LORA_NAME, REPORT_NAME, State, held_folder
from dittocache.studio.state import Studio


@dataclass(frozen=True)
class PastRun:
    """One run.

    Attributes:
        state, detail: as in `RunView`.
        stage: title of the stage at work, or that began last; empty before any has.
        started: seconds since the epoch; None before it has.
        seconds: from its start to its last event.
        losses: (step, loss) in the order of steps.
        has_lora, has_report: whether they are there.
    """

    run_dir: Path
    state: State
    detail: str
    stage: str
    started: float | None
    seconds: float
    losses: tuple[tuple[int, float], ...]
    has_lora: bool
    has_report: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.run_dir.name

    @property
    def can_go_on(self) -> bool:
        """Whether resuming it makes sense."""
        return self.state in ("stopped", "failed", "died")


class RunHistory:
    """Follows all runs of the Studio; what was read of a run is not read again."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._followers: dict[Path, RunFollower] = {}

    def look(self) -> list[PastRun]:
        """All runs, those started last first; raises AccessError where they are outside all roots."""
        folders = [file.parent for file in self._studio.runs_dir.glob(f"*/{EVENTS_NAME}")]
        self._followers = {folder: self._followers.get(folder) or RunFollower(folder) for folder in folders}
        runs = [_past_run(follower) for follower in self._followers.values()]
        return sorted(runs, key=lambda one: (-(one.started or 0.0), one.name))


def delete_run(studio: Studio, name: str) -> None:
    """Delete a run's folder with everything in it. What it cached stays, for others and for garbage collection.

    Raises AccessError for what is no run of this Studio, StageError while a process works in it.
    """
    runs = studio.runs_dir
    folder = studio.path(runs / name)
    if folder.parent != runs or not (folder / EVENTS_NAME).is_file():
        raise AccessError(f"{name!r} is no run in {runs}; nothing was deleted")
    with held_folder(folder, wait_seconds=0.0):
        shutil.rmtree(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, links not followed."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def _past_run(follower: RunFollower) -> PastRun:
    follower.poll()
    view = follower.view()
    stage, run_dir = view.stage, follower.run_dir
    seconds = (view.updated or 0.0) - (view.started or 0.0)
    return PastRun(
        run_dir=run_dir,
        state=view.state,
        detail=view.detail,
        stage=stage.title if stage is not None else "",
        started=view.started,
        seconds=max(0.0, seconds),
        losses=view.losses,
        has_lora=(run_dir / LORA_NAME).is_dir(),
        has_report=(run_dir / REPORT_NAME).is_file(),
    )
