"""Runs stages in order: follows their events, stops at the first failure, passes Ctrl-C on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dittocache.config import RunConfig, save_config
from dittocache.errors import StageError
from dittocache.events import Event, EventLog, follow_events, read_events
from dittocache.jobs.failures import STOPPED, STOPPED_CODES, describe_returncode, hint_for, last_lines
from dittocache.jobs.process import StageProcess
from dittocache.jobs.ranks import processes_to_train, rank_of
from dittocache.jobs.run_folder import CONFIG_NAME, EVENTS_NAME, LOG_NAME, WORKERS_NAME, WORKFLOW, held_folder
from dittocache.jobs.stages import CACHING
from dittocache.jobs.stopper import Stopper
from dittocache.jobs.workflow_start import tell_start

Listener = Callable[[Event], None]


class StageFailed(StageError):
    """A stage ended with an error; `returncode` is that of its process."""

    def __init__(self, message: str, returncode: int, stage: str = "") -> None:
        super().__init__(message)
        self.returncode = returncode
        self.stage = stage


class WorkflowStopped(StageError):
    """The run was stopped on request, in good order."""


def run_workflow(
    config: RunConfig,
    stages: Sequence[str],
    listener: Listener = lambda event: None,
    python: str = sys.executable,
    typed: str = "",
    lock: int | None = None,
) -> Path:
    """Run `stages` in order in `config.run_dir` and return that folder.

    Args:
        listener: called with every event of the run, from a thread of its own.
        python: interpreter of the stages.
        typed: what the user typed to start this, for the report.
        lock: descriptor that holds the run's folder, from whoever started this process and told the run's start.

    Stages that have nothing to do (everything is cached) are not started; an event says so. The caching stages run at
    the same time where their encoders have different devices. Where torchrun or Slurm started several processes, the
    first one runs the workflow; the others only help with caching, in folders of their own below the run's, and end.
    Training then starts as many processes as torchrun or `accelerate launch` had started on this machine. SIGINT and
    SIGTERM go to the stage, which ends in good order; a second one ends it at once.

    Raises StageFailed (what went wrong, the end of the output, a hint), WorkflowStopped, StageError when another run
    works in the folder or its files cannot be written.
    """
    config, stages = _part_of_rank(config, stages)
    run_dir = config.run_dir
    holding = held_folder(run_dir) if lock is None else contextlib.nullcontext(lock)
    with holding as held, _writable(run_dir), _former_settings_if_refused(run_dir / CONFIG_NAME):
        save_config(config, run_dir / CONFIG_NAME)
        path = run_dir / EVENTS_NAME
        offset = path.stat().st_size if path.exists() else 0
        log = EventLog(path, WORKFLOW)
        if lock is None:
            tell_start(run_dir, os.getpid(), stages, typed)
        started = time.monotonic()
        with _followed(path, offset, listener), Stopper(log) as stopper:
            for group in _groups(config, stages):
                left = [stage for stage in group if not _has_nothing_to_do(stage, path, offset)]
                if left:
                    _run_together(left, run_dir, held, python, stopper)
            log.emit("stage_finished", seconds=time.monotonic() - started)
    return run_dir


def _part_of_rank(config: RunConfig, stages: Sequence[str]) -> tuple[RunConfig, Sequence[str]]:
    """What this process of those that torchrun or Slurm started has to do: all of it, or help with caching."""
    rank = rank_of(os.environ)
    if rank.index == 0:
        kept = config.cache.keeps("vae") and config.cache.keeps("text_encoder")
        if not kept and "train" in stages:
            stages = (*stages, "remove_cache")
        processes = processes_to_train(os.environ, config.train.processes)
        return config.model_copy(update={"train": config.train.model_copy(update={"processes": processes})}), stages
    own = {"output_dir": config.run_dir / WORKERS_NAME, "name": f"rank-{rank.index}"}
    return config.model_copy(update=own), [stage for stage in stages if stage in CACHING]


@contextlib.contextmanager
def _writable(run_dir: Path) -> Iterator[None]:
    """Tell a person what it means when the run's own small files cannot be written."""
    try:
        yield
    except OSError as error:
        message = f"files of the run in {run_dir} cannot be written: {error.strerror or error}"
        hint = hint_for(1, str(error))
        raise StageError(f"{message}\nhint: {hint}" if hint else message) from error


@contextlib.contextmanager
def _former_settings_if_refused(file: Path) -> Iterator[None]:
    """Where validation refuses the run, put the settings back that `file` held: the next command starts from them."""
    former = file.read_bytes() if file.is_file() else None
    try:
        yield
    except StageFailed as failed:
        if failed.stage == "validate" and former is not None:
            file.write_bytes(former)
        elif failed.stage == "validate":
            file.unlink(missing_ok=True)
        raise


def _groups(config: RunConfig, stages: Sequence[str]) -> list[list[str]]:
    """The stages in order; those that run at the same time stand in one group."""
    groups: list[list[str]] = []
    for stage in stages:
        if config.cache.encodes_in_parallel and groups and (groups[-1][-1], stage) == CACHING:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _run_together(stages: Sequence[str], run_dir: Path, lock: int, python: str, stopper: Stopper) -> None:
    """Run one stage, or two at the same time, of which the second finishes after the first."""
    path = run_dir / EVENTS_NAME
    offset = path.stat().st_size
    if stopper.requests:
        fields = {"error": "stopped on request", "hint": "", "returncode": STOPPED, "stopped": True}
        EventLog(path, stages[0]).emit("stage_failed", **fields)
        raise WorkflowStopped(f"stopped before stage {stages[0]}; the same command goes on from here")
    running: dict[str, StageProcess] = {}
    problem: StageError | None = None
    done, first_holds = os.pipe()
    try:
        for stage in stages:
            first = stage == stages[0]
            running[stage] = StageProcess(
                stage,
                run_dir,
                lock,
                python,
                None if first else done,
                [first_holds] if len(stages) > 1 and first else [],
            )
    except StageError as error:
        problem = error
        EventLog(path, stage).emit("stage_failed", error=str(error), hint="", returncode=127)
        for process in running.values():
            process.send(signal.SIGINT)
    finally:
        os.close(done)
        os.close(first_holds)
    stopper.watch(list(running.values()))
    while running:
        stopper.enforce()
        for stage, process in list(running.items()):
            returncode = process.wait(0.2 / len(running))
            if returncode is None:
                continue
            del running[stage]
            try:
                _check_end(process, returncode, run_dir, offset, stopper)
            except StageError as error:
                problem = problem or error
                for other in running.values():
                    other.send(signal.SIGINT)
    if problem is not None:
        raise problem


def _check_end(process: StageProcess, returncode: int, run_dir: Path, offset: int, stopper: Stopper) -> None:
    """Raise what the end of a stage means, unless it is done."""
    if returncode == 0:
        return
    stage, path = process.stage, run_dir / EVENTS_NAME
    ends = (event for event in read_events(path, offset) if event["stage"] == stage)
    failure = next((event for event in ends if event["kind"] == "stage_failed"), None)
    stopped = bool(stopper.requests) and returncode in STOPPED_CODES | {-signal.SIGKILL}
    if failure is None:  # killed, or never got as far as its own error handling
        output = process.output()
        killed = returncode == -signal.SIGKILL  # in the middle of something: its last line says nothing of the cause
        error = "its process was killed" if killed else last_lines(output, 1) or "it left no output"
        error = "stopped on request" if stopped else error
        hint = "" if stopped else hint_for(returncode, output)
        failure = {"error": error, "hint": hint}
        with contextlib.suppress(OSError):  # on a full disk what is raised below is what can be told
            EventLog(path, stage).emit("stage_failed", returncode=returncode, stopped=stopped, **failure)
    if stopped or returncode in STOPPED_CODES:
        raise WorkflowStopped(f"stage {stage} was stopped; the same command goes on from here")
    raise StageFailed(_failure_message(stage, returncode, failure, process.output(), run_dir), returncode, stage)


def _failure_message(stage: str, returncode: int, failure: Event, output: str, run_dir: Path) -> str:
    lines = [f"stage {stage} failed ({describe_returncode(returncode)}): {failure['error']}"]
    tail = last_lines(output)
    told = tail.endswith(failure["error"].strip()) and "Traceback (most recent call last)" not in output
    if tail and not told and returncode not in (2, -signal.SIGKILL):
        lines += ["the end of its output:", *(f"  | {line}" for line in tail.splitlines())]
    if failure["hint"]:
        lines.append(f"hint: {failure['hint']}")
    lines.append(f"the whole log: {run_dir / LOG_NAME}")
    return "\n".join(lines)


def _has_nothing_to_do(stage: str, path: Path, offset: int) -> bool:
    """Whether validation found everything of this stage cached; if so, an event says it in the stage's name."""
    found = [event for event in read_events(path, offset) if event["stage"] == "validate" and "cached" in event]
    reused = found[-1]["cached"].get(stage) if found else None
    if reused is None:
        return False
    log = EventLog(path, stage)
    log.emit("stage_started", pid=os.getpid(), command=[])
    log.emit("result", encoded=0, reused=reused, bytes_written=0, seconds=0.0, failed={})
    log.emit("stage_finished", seconds=0.0)
    return True


@contextlib.contextmanager
def _followed(path: Path, offset: int, listener: Listener) -> Iterator[None]:
    """Give every event from `offset` on to the listener until the block ends, the last ones included."""
    done = threading.Event()

    def follow() -> None:
        for event in follow_events(path, done.is_set, offset=offset):
            listener(event)

    follower = threading.Thread(target=follow, name="event-follower", daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()
