"""One stage as a process: `python -m dittocache.jobs.stage STAGE --run-dir RUN`.

Exit codes: 0 done, 2 the settings, the data set or the model are at fault, 130 stopped on request, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from dittocache.errors import ConfigError, DataError, DittocacheError, ModelError
from dittocache.events import EventLog
from dittocache.jobs.failures import STOPPED, hint_for
from dittocache.jobs.memory_reports import memory_reports
from dittocache.jobs.process_identity import birth_of
from dittocache.jobs.run_folder import CONFIG_NAME, EVENTS_NAME
from dittocache.jobs.stages import STAGES

ORPHAN_SECONDS = 60.0
"""Time for ending in good order that a stage has when its workflow is gone: for the step under way and a checkpoint."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage that the command line names and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dittocache.jobs.stage", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--run-dir", type=Path, required=True, help="folder with the run's config.yaml")
    parser.add_argument("--lifeline", type=int, help="descriptor that closes when the workflow's process is gone")
    parser.add_argument("--worker", type=int, default=0, help="number of a process that encodes beside another")
    parser.add_argument(
        "--after", type=int, help="descriptor that closes when the stage that runs beside this one ends"
    )
    options = parser.parse_args(arguments)
    # Both mean Ctrl-C until a stage takes them into its own hands; a shell's background job inherits SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if options.lifeline is not None:
        threading.Thread(target=_stop_when_orphaned, args=(options.lifeline,), daemon=True).start()
    return run_stage(options.stage, options.run_dir, options.worker, options.after)


def run_stage(name: str, run_dir: Path, worker: int = 0, after: int | None = None) -> int:
    """Carry out one stage in this process, with its events; return the exit code.

    Args:
        worker, after: as in `RunInputs`.
    """
    # Of the processes that train together in one folder, the first speaks for all.
    speaks = name != "train" or os.environ.get("RANK", "0") == "0"
    log = EventLog(run_dir / EVENTS_NAME if speaks else Path(os.devnull), name)
    try:
        return _told(name, run_dir, worker, after, log)
    except OSError as failure:  # the events themselves cannot be written: the log is what is left to tell by
        traceback.print_exc()
        sys.stderr.write(f"{log.path} cannot be written: {failure.strerror or failure}\n")
        return 1


def _told(name: str, run_dir: Path, worker: int, after: int | None, log: EventLog) -> int:
    """Carry out the stage, and tell its beginning and its end as events."""
    pid = os.getpid()
    log.emit("stage_started", pid=pid, birth=birth_of(pid), command=[sys.executable, *sys.argv])
    started = time.monotonic()
    try:
        from dittocache.config import load_config
        from dittocache.jobs.inputs import RunInputs

        with memory_reports(log):
            STAGES[name].load()(RunInputs(load_config(run_dir / CONFIG_NAME), run_dir, worker, after), log)
    except KeyboardInterrupt:
        error = "stopped on request; the same command goes on from here"
        log.emit("stage_failed", error=error, hint="", returncode=STOPPED, stopped=True)
        return STOPPED
    except DittocacheError as failure:
        returncode = 2 if isinstance(failure, ConfigError | DataError | ModelError) else 1
        sys.stderr.write(f"{failure}\n")
        hint = hint_for(returncode, str(failure)) if returncode == 1 else ""
        log.emit("stage_failed", error=str(failure), hint=hint, returncode=returncode)
        return returncode
    except Exception as failure:
        # The traceback belongs in the log; the person at the terminal gets the last line and a hint.
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
        log.emit("stage_failed", error=error, hint=hint_for(1, error), returncode=1)
        return 1
    log.emit("stage_finished", seconds=time.monotonic() - started)
    return 0


def _stop_when_orphaned(lifeline: int) -> None:
    """Wait until the workflow's process is gone, then end in good order: a run nobody waits for holds up the next.

    A stage that does not end by itself, because it hangs, takes everything that it has started with it.
    """
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    if os.getpgrp() == os.getpid():  # the group is ours, as `StageProcess` makes it
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
