"""Several processes for one training on this machine: the stage is the first, and starts the others.

`accelerate launch` does the same across machines: it sets the variables itself, and nothing is started here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ADDRESS = "127.0.0.1"
GRACE_SECONDS = 60.0  # for the other processes to end after the first one, and the other way round


@contextmanager
def other_processes(run_dir: Path, count: int) -> Iterator[None]:
    """With `count` processes in all: start the others, and make this one the first, until the block ends.

    They belong to this process's group, so that signals to the group reach them, and write to the same log. None is
    left behind; when one of them fails, this process fails too.
    """
    if count == 1 or "WORLD_SIZE" in os.environ:
        yield
        return
    shared = {
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    command = [sys.executable, "-m", "dittocache.jobs.stage", "train", "--run-dir", str(run_dir)]
    others = [subprocess.Popen(command, env={**os.environ, **rank}, stdin=subprocess.DEVNULL) for rank in ranks[1:]]
    ended = threading.Event()
    threading.Thread(target=_end_when_one_fails, args=(others, ended), daemon=True).start()
    os.environ.update(ranks[0])
    try:
        yield
    except BaseException:
        for process in others:
            process.send_signal(signal.SIGTERM)
        raise
    finally:
        ended.set()
        for name in ranks[0]:
            os.environ.pop(name, None)
        for process in others:
            _wait_or_kill(process)


def _end_when_one_fails(others: Sequence[subprocess.Popen[bytes]], ended: threading.Event) -> None:
    """End this process when one of the others failed and it still waits for them, which nothing can interrupt."""
    while not ended.wait(0.5):
        failed = [(rank, code) for rank, process in enumerate(others, start=1) if (code := process.poll())]
        if not failed or ended.wait(GRACE_SECONDS):
            continue
        for process in others:
            process.kill()
        words = ", ".join(f"process {rank} with code {code}" for rank, code in failed)
        sys.stderr.write(f"training on {len(others) + 1} processes ended, because of {words}; see its words above\n")
        sys.stderr.flush()
        os._exit(1)


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((ADDRESS, 0))
        port: int = listener.getsockname()[1]
    return port
