"""Start the processes of a DDP run on this machine and wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import dittocache

ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    """Variables for a Python process of its own that imports the package and the tests, on one core."""
    sources = str(Path(dittocache.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([sources, str(ROOT)]), "OMP_NUM_THREADS": "1", **variables}


def run_distributed(arguments: Sequence[str], world: int, port: int, timeout: float = 100) -> list[tuple[int, str]]:
    """Run `python ARGUMENTS` as `world` ranks; return code and output of each. Kills all when time is up."""
    shared = environment(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        ACCELERATE_USE_CPU="true",
    )
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        return [(process.wait(timeout), process.stdout.read() if process.stdout else "") for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
