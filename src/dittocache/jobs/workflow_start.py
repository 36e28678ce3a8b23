"""The first event of a run: who runs it, what, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dittocache.events import EventLog
from dittocache.jobs.process_identity import birth_of
from dittocache.jobs.run_folder import EVENTS_NAME, WORKFLOW


def tell_start(run_dir: Path, pid: int, stages: Sequence[str], typed: str, job: str = "") -> None:
    """Say that the process `pid` runs these stages from here on.

    Args:
        typed: what the user typed to start it.
        job: its name in a queue; empty where it comes from none.
    """
    fields = {"command": list(stages), "typed": typed, **({"job": job} if job else {})}
    EventLog(run_dir / EVENTS_NAME, WORKFLOW).emit("stage_started", pid=pid, birth=birth_of(pid), **fields)
