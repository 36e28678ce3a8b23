"""Starts a workflow as a process of its own, which goes on when the starter and its terminal are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dittocache.config import RunConfig
from dittocache.errors import StageError
from dittocache.jobs.ranks import without_rank
from dittocache.jobs.run_folder import LOG_NAME, held_folder
from dittocache.jobs.stopper import STOP_SIGNALS
from dittocache.jobs.workflow_start import tell_start


def start_run(
    config: RunConfig,
    stages: Sequence[str],
    *,
    typed: str = "",
    cwd: Path | None = None,
    job: str = "",
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> Path:
    """Start `stages` in the background and return the run's folder at once, absolute.

    Args:
        typed: what a user would type to do the same, for the report.
        cwd: where the settings' relative paths start from; the working directory where None.
        job: its name in a queue, kept in the run's first event.
        environment: variables of the run besides those of this process.
        python: interpreter of the workflow and of its stages.

    The folder is held from here on without a gap, so a second start is refused and `run_status` says `running`.
    Raises StageError when another run is at work in the folder, or the interpreter cannot be run; ConfigError when the
    folder cannot be written.
    """
    base = (cwd or Path.cwd()).absolute()
    run_dir = base / config.run_dir
    command = [python, "-m", "dittocache.jobs.background.workflow_process"]
    with held_folder(run_dir, wait_seconds=0.5) as lock, tempfile.TemporaryFile() as settings:
        settings.write(config.model_dump_json().encode())
        settings.seek(0)
        arguments = [*command, "--lock", str(lock), "--stages", ",".join(stages), "--run-dir", str(run_dir)]
        with (run_dir / LOG_NAME).open("ab") as output, _signals_held_back():
            try:
                process = subprocess.Popen(
                    arguments,
                    cwd=base,
                    stdin=settings,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**without_rank(os.environ), **(environment or {})},
                    pass_fds=[lock],
                    start_new_session=True,  # neither a closed terminal nor its Ctrl-C reaches it
                )
            except OSError as error:
                message = (
                    f"the run cannot start: the Python interpreter {python!r} cannot be run "
                    f"({error.strerror or error}); activate the environment that dittocache is installed in"
                )
                raise StageError(message) from error
        tell_start(run_dir, process.pid, stages, typed, job)
    threading.Thread(target=process.wait, name="run-reaper", daemon=True).start()  # else it would stay as a zombie
    return run_dir


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started here gets a request to stop when it is ready for it, however early it comes."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
