"""The process of a run in the background: `python -m dittocache.jobs.background.workflow_process`, settings on stdin.

Started by `start_run` alone, which holds the run's folder until this process does. Exit codes as of a stage.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dittocache.errors import DittocacheError
from dittocache.events import EventLog
from dittocache.jobs.failures import STOPPED, hint_for
from dittocache.jobs.run_folder import EVENTS_NAME, WORKFLOW


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and return the exit code; everything that goes wrong is told as an event of the run."""
    parser = argparse.ArgumentParser(prog="python -m dittocache.jobs.background.workflow_process", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--stages", required=True, help="names, with commas between them")
    parser.add_argument("--lock", type=int, required=True, help="descriptor that holds the run's folder")
    options = parser.parse_args(arguments)
    try:
        return _run(sys.stdin.read(), options.stages.split(","), options.lock)
    except Exception as failure:
        traceback.print_exc()
        error = str(failure) if isinstance(failure, DittocacheError) else f"{type(failure).__name__}: {failure}"
        with suppress(OSError):  # a full disk; the traceback was what could be done
            log = EventLog(options.run_dir / EVENTS_NAME, WORKFLOW)
            log.emit("stage_failed", error=error, hint=hint_for(1, error), returncode=1)
        return 1


def _run(settings: str, stages: Sequence[str], lock: int) -> int:
    from dittocache.config import check_config
    from dittocache.jobs.workflow import StageFailed, WorkflowStopped, run_workflow

    try:
        run_workflow(check_config(json.loads(settings)), stages, lock=lock)
    except StageFailed as failed:
        return failed.returncode if failed.returncode > 0 else 1
    except WorkflowStopped:
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
