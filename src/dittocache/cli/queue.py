"""`dittocache queue add | list | run | stop | remove | clear`: runs in the background, one at a time on each device."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Literal

from cyclopts import App
from rich.console import Console
from rich.table import Table

from dittocache.cli.shared import DataPath, Flag, ModelPath, Overrides, RunFile, load_settings, note, say, settings_help
from dittocache.config import RunConfig
from dittocache.errors import StageError
from dittocache.jobs.queue.folder import Queue, QueueEntry
from dittocache.jobs.stages import CACHE, TRAIN

queue_app = App(
    name="queue",
    help="Runs in the background, one after the other on each device. They go on when the terminal is closed, and wait "
    "on disk: after a restart of the machine, `dittocache queue run` goes on with those that were waiting.",
)


@queue_app.command(help_epilogue=settings_help())
def add(
    *settings: Overrides,
    config: RunFile = None,
    data: DataPath = None,
    model: ModelPath = None,
    do: Literal["train", "cache", "generate", "report"] = "train",
) -> None:
    """Put a run in line; it begins at once where its device is free.

    Parameters
    ----------
    do
        What the run does: the command of this name.
    settings
        Any setting, such as `--train.steps 2000`.
    """
    from dittocache.jobs.queue.runner import ensure_runner

    chosen = load_settings(config, settings, data, model)
    queue = Queue()
    job = queue.add(chosen, _stages(do, chosen), typed=shlex.join(["dittocache", *sys.argv[1:]]))
    ensure_runner(queue)
    say(job.number)
    note(f"job {job.number} for {', '.join(job.devices)}: {job.run_dir}; see `dittocache queue list`")


@queue_app.command(name="list")
def list_jobs(*, json: Flag = False) -> None:
    """List the jobs: waiting, running and ended, each with what became of it.

    Parameters
    ----------
    json
        Print JSON for programs instead of words.
    """
    from dittocache.jobs.queue.runner import ensure_runner

    queue = Queue()
    ensure_runner(queue)  # after a restart nobody else starts what was waiting
    entries = queue.entries()
    if json:
        Console().print_json(data=[_described(entry) for entry in entries])
        return
    if not entries:
        say("no jobs")
        return
    table = Table("job", "run", "does", "device", "is")
    for entry in entries:
        first_line = entry.detail.splitlines()[0] if entry.detail else ""
        state = f"{entry.state}: {first_line}" if first_line and entry.state in ("failed", "died") else entry.state
        job = entry.job
        table.add_row(str(job.number), str(job.run_dir), job.stages[-1], ", ".join(job.devices), state)
    Console(markup=False, highlight=False).print(table)


@queue_app.command
def run() -> None:
    """Run the queue here, in sight, until nothing is left. Ctrl-C leaves the run that is at work alone."""
    from dittocache.jobs.queue.runner import run_queue

    if not run_queue(Queue(), listener=say):
        say("another process runs the queue already; see `dittocache queue list`")


@queue_app.command
def stop(number: int) -> None:
    """Stop a running job: what is under way is finished and saved. A second time ends it at once.

    Parameters
    ----------
    number
        The job's, as `dittocache queue list` shows it.
    """
    from dittocache.jobs.background.stopping import stop_run

    entry = next((entry for entry in Queue().entries() if entry.job.number == number), None)
    if entry is None:
        raise StageError(f"there is no job {number}; see `dittocache queue list`")
    if entry.state == "waiting":
        raise StageError(f"job {number} waits; take it out of the line with `dittocache queue remove {number}`")
    say("stopping" if entry.state == "running" and stop_run(entry.job.run_dir) else "it has ended already")


@queue_app.command
def remove(number: int) -> None:
    """Take a waiting job out of the line, or an ended one off the list. The run's folder stays.

    Parameters
    ----------
    number
        The job's, as `dittocache queue list` shows it.
    """
    Queue().remove(number)


@queue_app.command
def clear() -> None:
    """Take all jobs that have ended off the list. The runs' folders stay."""
    say(f"{Queue().clear()} jobs taken off the list")


def _stages(command: str, config: RunConfig) -> Sequence[str]:
    stages = {"train": TRAIN, "cache": CACHE}.get(command, (command,))
    return stages if config.cache.use_cache or command != "train" else ("validate", "train")


def _described(entry: QueueEntry) -> dict[str, object]:
    job = entry.job
    return {
        "number": job.number,
        "run_dir": str(job.run_dir),
        "stages": list(job.stages),
        "devices": list(job.devices),
        "state": entry.state,
        "detail": entry.detail,
    }
