"""The queue's folder: jobs are added, listed, removed, started and settled; by any number of processes at a time."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dittocache.config import RunConfig
from dittocache.errors import ConfigError, StageError
from dittocache.jobs.queue.job import Job, job_text, new_job, read_job
from dittocache.jobs.run_folder import EVENTS_NAME, is_locked, run_status, try_lock

FOLDER_VARIABLE = "DITTOCACHE_QUEUE"
WAITING, STARTED, ENDED = "waiting", "started", "ended"

JobState = Literal["waiting", "running", "finished", "stopped", "failed", "died"]
_ENDINGS: tuple[JobState, ...] = ("finished", "stopped", "failed", "died")


@dataclass(frozen=True)
class QueueEntry:
    """A job and how it stands; `detail` says why it failed or died, else is empty."""

    job: Job
    state: JobState
    detail: str = ""


def default_folder() -> Path:
    """`$DITTOCACHE_QUEUE`, else `~/.local/state/dittocache/queue/HOST`: devices belong to a machine, not a project."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "dittocache" / "queue" / socket.gethostname()


class Queue:
    """The jobs of one machine.

    Args:
        folder: as in `default_folder` where None.

    Raises ConfigError where the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        try:
            for name in (WAITING, STARTED, ENDED):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the queue's folder {self.folder} cannot be made ({error.strerror or error}); name another with "
                f"{FOLDER_VARIABLE}"
            ) from error

    def add(self, config: RunConfig, stages: Sequence[str], typed: str = "") -> Job:
        """Put a run at the end of the line. Somebody must run the queue: see `ensure_runner`.

        Raises ConfigError for a device that is not there.
        """
        unnumbered = new_job(config, stages, typed, time.time())
        with self._locked("add.lock"):
            job = replace(unnumbered, number=self._last_number() + 1)
            self._write(WAITING, job_text(job), job.number)
        return job

    def entries(self) -> list[QueueEntry]:
        """All jobs in the order of adding, each as it stands now."""
        found = {}
        for name in (WAITING, STARTED, ENDED):  # in the order in which they move: none is missed, the later one counts
            for job, more in self._read(name):
                if name == WAITING:
                    found[job.number] = QueueEntry(job, "waiting")
                elif name == STARTED:
                    found[job.number] = _standing(job, more)
                else:
                    found[job.number] = QueueEntry(job, _ending(more), str(more.get("detail", "")))
        return [found[number] for number in sorted(found)]

    def remove(self, number: int) -> None:
        """Take a job that waits out of the line, or one that has ended off the list; its run's folder stays.

        Raises StageError where it is running, or there is no such job.
        """
        for name in (WAITING, ENDED):
            with suppress(FileNotFoundError):
                self._path(name, number).unlink()
                return
        if self._path(STARTED, number).exists():
            raise StageError(f"job {number} is running; stop it first")
        raise StageError(f"there is no job {number} in the queue {self.folder}")

    def clear(self) -> int:
        """Take all jobs that have ended off the list, and return how many they were."""
        ended = [job.number for job, _ in self._read(ENDED)]
        for number in ended:
            self._path(ENDED, number).unlink(missing_ok=True)
        return len(ended)

    def waiting(self) -> list[Job]:
        """The jobs that wait, in order."""
        return [job for job, _ in self._read(WAITING)]

    def started(self) -> list[Job]:
        """The jobs whose runs were started and are not settled."""
        return [job for job, _ in self._read(STARTED)]

    def note_begun(self, job: Job) -> None:
        """Note that a claimed job's run was started, so that it is not started again even if its folder is deleted."""
        self._write(STARTED, job_text(job, begun=time.time()), job.number)

    def claim(self, job: Job) -> bool:
        """Take a waiting job to start it; False where it was removed meanwhile."""
        return self._move(job, WAITING, STARTED)

    def settle(self) -> None:
        """Move started jobs on: those whose runs have ended, and back in line those whose runs never began.

        For the runner alone, while it holds its lock.
        """
        for job, more in self._read(STARTED):
            if is_locked(job.run_dir):
                continue
            if not _has_begun(job, more):  # the runner was ended between claiming and starting it
                self._move(job, STARTED, WAITING)
                continue
            entry = _standing(job, more)
            self.end(job, entry.state, entry.detail)

    def end(self, job: Job, state: str, detail: str) -> None:
        """Note how a started job has ended."""
        self._write(ENDED, job_text(job, state=state, detail=detail, ended=time.time()), job.number)
        self._path(STARTED, job.number).unlink(missing_ok=True)

    @contextmanager
    def runner_lock(self) -> Iterator[bool]:
        """Whether this process is the one that starts jobs until the block ends; False where another one is."""
        descriptor = os.open(self.folder / "runner.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield try_lock(descriptor)
        finally:
            os.close(descriptor)

    def _read(self, name: str) -> list[tuple[Job, dict[str, object]]]:
        found = []
        for path in sorted((self.folder / name).glob("*.json")):
            with suppress(FileNotFoundError, StageError):  # moved on meanwhile; or no job, which holds up no other
                found.append(read_job(path))
        return sorted(found, key=lambda pair: pair[0].number)

    def _write(self, name: str, text: str, number: int) -> None:
        """Write a job's file durably: there whole, or not at all."""
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self._path(name, number))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _move(self, job: Job, source: str, target: str) -> bool:
        try:
            self._path(source, job.number).rename(self._path(target, job.number))
        except FileNotFoundError:
            return False
        return True

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name / f"{number:06}.json"

    def _last_number(self) -> int:
        files = [path for name in (WAITING, STARTED, ENDED) for path in (self.folder / name).glob("*.json")]
        return max((int(path.stem) for path in files if path.stem.isdecimal()), default=0)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _standing(job: Job, more: Mapping[str, object]) -> QueueEntry:
    """How a started job stands, from its run."""
    status = run_status(job.run_dir)
    if status.state == "running":
        return QueueEntry(job, "running")
    if not _has_begun(job, more):
        return QueueEntry(job, "waiting")
    if status.state == "new":
        return QueueEntry(job, "died", f"its folder {job.run_dir} is gone")
    return QueueEntry(job, status.state, status.detail)


def _ending(more: Mapping[str, object]) -> JobState:
    state = more.get("state")
    return next((one for one in _ENDINGS if one == state), "died")


def _has_begun(job: Job, more: Mapping[str, object]) -> bool:
    """Whether the job's run was started: noted beside the job, or told by the run."""
    if "begun" in more:
        return True
    try:
        with (
            (job.run_dir / EVENTS_NAME).open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.rfind(f'"job": "{job.key}"'.encode()) >= 0
    except (OSError, ValueError):  # not there, or empty
        return False
