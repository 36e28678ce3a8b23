"""The process that starts the jobs of a queue in turn: `python -m dittocache.jobs.queue.runner --folder QUEUE`.

It ends when nothing is left to start. Ended by force it leaves the runs alone: they are processes of their own, and
the next runner finds them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dittocache.errors import DittocacheError
from dittocache.jobs.background.starting import start_run
from dittocache.jobs.queue.folder import Queue
from dittocache.jobs.queue.job import Job
from dittocache.jobs.queue.scheduling import startable
from dittocache.jobs.run_folder import is_locked

POLL_SECONDS = 0.5


def ensure_runner(queue: Queue, python: str = sys.executable) -> bool:
    """Have a process start the waiting jobs, which goes on when this one ends; True where it was started just now.

    To be called after adding a job, and whenever a page or a command opens: after a restart of the machine nobody else
    starts what was waiting.
    """
    with queue.runner_lock() as free:
        if not free or not (queue.waiting() or queue.started()):
            return False
    with (queue.folder / "runner.log").open("ab") as output:
        process = subprocess.Popen(
            [python, "-m", "dittocache.jobs.queue.runner", "--folder", str(queue.folder.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    threading.Thread(target=process.wait, name="queue-runner-reaper", daemon=True).start()
    return True


def run_queue(
    queue: Queue,
    python: str = sys.executable,
    listener: Callable[[str], None] = lambda text: None,
    poll_seconds: float = POLL_SECONDS,
) -> bool:
    """Start jobs in turn until none is left; False where another process does so already.

    Args:
        python: interpreter of the runs.
        listener: told in words which jobs begin and end.
    """
    while True:
        with queue.runner_lock() as held:
            if not held:
                return False
            _run_all(queue, python, listener, poll_seconds)
        # A job that was added after the last look, by somebody who saw the lock still held, is ours to start.
        if not queue.waiting():
            return True


def _run_all(queue: Queue, python: str, listener: Callable[[str], None], poll_seconds: float) -> None:
    known: set[int] = set()
    while True:
        queue.settle()
        running = queue.started()
        for number in known - {job.number for job in running}:
            listener(f"job {number} has ended")
        known = {job.number for job in running}
        waiting = queue.waiting()
        if not running and not waiting:
            return
        busy = {device for job in running for device in job.devices}
        begun = [job for job in startable(waiting, busy) if _start(queue, job, python)]
        for job in begun:
            listener(f"job {job.number} has begun: {job.run_dir}")
        known |= {job.number for job in begun}
        time.sleep(poll_seconds)


def _start(queue: Queue, job: Job, python: str) -> bool:
    """Start a job's run; one that cannot be started has failed, and holds up no other."""
    if is_locked(job.run_dir) or not queue.claim(job):  # a run by hand in the same folder goes first
        return False
    environment = {} if job.visible is None else {"CUDA_VISIBLE_DEVICES": job.visible}
    try:
        start_run(
            job.settings(),
            job.stages,
            typed=job.typed,
            cwd=Path(job.cwd),
            job=job.key,
            python=python,
            environment=environment,
        )
    except (DittocacheError, OSError) as error:
        queue.end(job, "failed", str(error))
        return False
    queue.note_begun(job)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the queue of the folder until nothing is left."""
    parser = argparse.ArgumentParser(prog="python -m dittocache.jobs.queue.runner", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    run_queue(Queue(parser.parse_args(arguments).folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
