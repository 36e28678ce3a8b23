"""A stage's process: started from an argument list, its output in the run's log, stopped as a group."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from dittocache.errors import StageError
from dittocache.jobs.process_identity import group_members
from dittocache.jobs.ranks import without_rank
from dittocache.jobs.run_folder import LOG_NAME
from dittocache.jobs.stages import CACHING

CPU_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait by spinning slow a stage down ten times and more on cores that it shares; sleeping costs little."""

LEFT_BEHIND_SECONDS = 2.0
"""Time for ending by themselves that the processes of a stage have when the stage has ended."""


class StageProcess:
    """Starts one stage at once.

    Args:
        stage: its name.
        run_dir: folder of the run.
        lock: descriptor of the run folder's lock, which the stage inherits.
        python: the interpreter.
        after: descriptor of a pipe's read end; the stage finishes only when the pipe's other end is closed everywhere.
        holds: descriptors that the stage inherits and that close when it ends.

    Raises StageError when the interpreter cannot be started.
    """

    def __init__(
        self,
        stage: str,
        run_dir: Path,
        lock: int,
        python: str = sys.executable,
        after: int | None = None,
        holds: Sequence[int] = (),
    ) -> None:
        self.stage = stage
        self._log = run_dir / LOG_NAME
        # The stage reads from a pipe that only this process can write to: it closes when this process is gone.
        lifeline, self._lifeline = os.pipe()
        self.command = [python, "-m", "dittocache.jobs.stage", stage]
        self.command += ["--run-dir", str(run_dir), "--lifeline", str(lifeline)]
        inherited = [lifeline, lock, *holds]
        if after is not None:
            self.command += ["--after", str(after)]
            inherited.append(after)
        with self._log.open("ab") as output:
            began = datetime.now().astimezone().isoformat(timespec="seconds")
            output.write(f"== {stage}, {began}\n$ {shlex.join(self.command[:6])}\n".encode(errors="replace"))
            output.flush()
            self._log_start = output.tell()
            try:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**CPU_THREADS, **environment_of(stage)},
                    pass_fds=inherited,
                    start_new_session=True,  # a group of its own: Ctrl-C reaches it through us only, in good order
                )
            except OSError as error:
                os.close(self._lifeline)
                raise StageError(
                    f"stage {stage} cannot start: the Python interpreter {python!r} cannot be run "
                    f"({error.strerror or error}); activate the environment that dittocache is installed in"
                ) from error
            finally:
                os.close(lifeline)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout: float) -> int | None:
        """The return code, negative for the signal that ended it; None when it still runs after `timeout` seconds.

        Once it has ended, what it has started and left behind is ended too.
        """
        running = self._process.returncode is None
        try:
            returncode = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        if running:
            self._end_group()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        return returncode

    def _end_group(self) -> None:
        """Give the processes that the stage has left behind a moment, then end them."""
        deadline = time.monotonic() + LEFT_BEHIND_SECONDS
        while group_members(self._process.pid):
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                return
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the stage and all processes it started."""
        if self._process.returncode is not None:
            return  # its number may belong to another process by now
        with contextlib.suppress(ProcessLookupError):  # it may have ended this moment
            os.killpg(self._process.pid, number)

    def output(self) -> str:
        """What the stage wrote to stdout and stderr."""
        with self._log.open("rb") as stream:
            stream.seek(self._log_start)
            return stream.read().decode(errors="replace")


def environment_of(stage: str) -> dict[str, str]:
    """Caching is shared among the processes of a launcher; for any other stage they would wait for each other."""
    return dict(os.environ) if stage in CACHING else without_rank(os.environ)
