"""All runs below a folder, at a glance: read from the ends of their event streams, so that hundreds take no time."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from dittocache.errors import StageError
from dittocache.events import Event, EventReader, number_in, parse_event, read_events
from dittocache.jobs.following.losses import LossCurve
from dittocache.jobs.run_folder import (
    CONFIG_NAME,
    EVENTS_NAME,
    SAMPLES_NAME,
    WORKFLOW,
    State,
    held_folder,
    is_locked,
    last_told,
)

TRASH_NAME = ".trash"  # beside the runs: where deleted ones go
_START = f'"stage": "{WORKFLOW}", "kind": "stage_started"'.encode()  # as `EventLog` writes it
_METRIC = b'"stage": "train", "kind": "metric"'
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class RunSummary:
    """A run in the list of runs.

    Attributes:
        state, stage, detail: as in `RunStatus`.
        started: seconds since the epoch, of the start that came last; None for a run that never began.
        seconds: from there to its last event.
        step, steps: of the training, where it got so far.
        loss: of the last step.
        samples: pictures in its folder, the newest first, at most four.
        sample_count: how many there are.
    """

    name: str
    run_dir: Path
    state: State
    stage: str = ""
    detail: str = ""
    started: float | None = None
    seconds: float = 0.0
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    samples: tuple[Path, ...] = ()
    sample_count: int = 0


def list_runs(root: Path) -> list[RunSummary]:
    """The runs whose folders are in `root`, those that were started last first; empty where there is no such folder."""
    try:
        with os.scandir(root) as entries:
            folders = [Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
    runs = [summary_of(folder) for folder in folders if is_run(folder)]
    return sorted(runs, key=lambda run: (-(run.started or 0.0), run.name))


def is_run(folder: Path) -> bool:
    """Whether a run has begun in the folder, or was about to."""
    return (folder / EVENTS_NAME).is_file() or (folder / CONFIG_NAME).is_file()


def summary_of(run_dir: Path) -> RunSummary:
    """One run at a glance."""
    live = is_locked(run_dir)
    ends, events = last_told(run_dir)
    status = ends.status(live)
    started = _last_start(run_dir / EVENTS_NAME)
    updated = events[-1]["time"] if events else started
    step = steps = loss = None
    for event in events:
        if event["stage"] == "train" and event["kind"] == "metric":
            step, loss = int(event["step"]), number_in(event, "loss")
        elif event["stage"] == "train" and event["kind"] == "progress":
            to_come = event["total"] - event["done"]
            steps = None if step is None else int(step + to_come)
        elif event["stage"] == "train" and event["kind"] == "result":
            found = number_in(event, "steps")
            steps = steps if found is None else int(found)
    if step is None and (last := _last_event(run_dir / EVENTS_NAME, _METRIC)) is not None:
        step, loss = int(last["step"]), number_in(last, "loss")  # much was told since, such as of pictures
    samples = _samples(run_dir)
    return RunSummary(
        name=run_dir.name,
        run_dir=run_dir,
        state=status.state,
        stage=status.stage,
        detail=status.detail,
        started=started,
        seconds=max(0.0, updated - started) if started is not None and updated is not None else 0.0,
        step=step,
        steps=steps,
        loss=loss,
        samples=tuple(samples[:4]),
        sample_count=len(samples),
    )


def losses_of(run_dir: Path) -> tuple[tuple[int, float], ...]:
    """The loss curve of a run, as in `RunView.losses`."""
    curve = LossCurve()
    for event in read_events(run_dir / EVENTS_NAME):
        if event["stage"] != "train":
            continue
        if event["kind"] == "metric" and (loss := number_in(event, "loss")) is not None:
            curve.add(int(event["step"]), loss)
        elif event["kind"] == "result" and (resumed_from := number_in(event, "resumed_from")) is not None:
            curve.cut(int(resumed_from))
    return curve.points()


def compare_losses(run_dirs: list[Path]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Run name -> loss curve; runs without one are left out."""
    curves = {run_dir.name: losses_of(run_dir) for run_dir in run_dirs}
    return {name: curve for name, curve in curves.items() if curve}


def trash_run(run_dir: Path) -> Path:
    """Move a run to `.trash` beside it and return where it is now; what it cached stays in the cache.

    Raises StageError where it is at work, or is no run.
    """
    return _taken_away(run_dir)


def delete_run(run_dir: Path) -> None:
    """Delete a run's folder for good; what it cached stays in the cache. Raises as `trash_run`."""
    shutil.rmtree(_taken_away(run_dir))


def _taken_away(run_dir: Path) -> Path:
    if not is_run(run_dir):
        raise StageError(f"{run_dir} is no folder of a run; nothing was deleted")
    if is_locked(run_dir):
        raise StageError(f"the run in {run_dir} is at work; stop it before deleting it")
    trash = run_dir.parent / TRASH_NAME
    with held_folder(run_dir, wait_seconds=0.5):  # nobody begins anew in it meanwhile
        trash.mkdir(exist_ok=True)
        place = trash / f"{run_dir.name}-{time.time_ns()}"
        run_dir.rename(place)
    return place


def _last_start(path: Path) -> float | None:
    """When the run was started last."""
    event = _last_event(path, _START)
    if event is None:
        event = next(iter(EventReader(path).read()), None)
    return None if event is None else float(event["time"])


def _last_event(path: Path, mark: bytes) -> Event | None:
    """The last event with these bytes in its line: the file is searched from its end, and one line of it is read."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = content.rfind(mark)
            if found < 0:
                return None
            beginning = content.rfind(b"\n", 0, found) + 1
            end = content.find(b"\n", found)
            return parse_event(content[beginning : end if end >= 0 else len(content)])
    except (OSError, ValueError):  # not there, or empty
        return None


def _samples(run_dir: Path) -> list[Path]:
    """The pictures of a run, the newest first."""
    found: list[tuple[float, Path]] = []
    folders = [run_dir / SAMPLES_NAME]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    elif entry.name.lower().endswith(_PICTURES):
                        found.append((entry.stat().st_mtime, Path(entry.path)))
        except OSError:
            continue
    return [path for _, path in sorted(found, reverse=True)]
