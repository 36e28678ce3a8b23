"""Tells now and then how much memory a stage uses: of its process, and of the GPUs that it works on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from dittocache.events import EventLog

FIRST_SECONDS = 1.0
INTERVAL_SECONDS = 5.0
LEAST_CHANGE = 0.005  # of the device's memory; less is not worth a line in a run of days


@contextmanager
def memory_reports(log: EventLog, first: float = FIRST_SECONDS, interval: float = INTERVAL_SECONDS) -> Iterator[None]:
    """Emit `memory` events from a thread until the block ends: after `first` seconds, then every `interval` seconds.

    What has hardly changed since it was told last is not told again.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_report, args=(log, ended, first, interval), name="memory-reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def memory_in_use() -> dict[str, tuple[int, int]]:
    """Device -> bytes used and in all: `cpu` is this process alone, a GPU everything that is on it."""
    found = {"cpu": (psutil.Process().memory_info().rss, psutil.virtual_memory().total)}
    torch = sys.modules.get("torch")  # a stage that has not loaded it has nothing on a GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(index) > 0:
                free, total = torch.cuda.mem_get_info(index)
                found[f"cuda:{index}"] = (total - free, total)
    return found


def _report(log: EventLog, ended: threading.Event, first: float, interval: float) -> None:
    told: dict[str, int] = {}
    pause = first
    while not ended.wait(pause):
        pause = interval
        for device, (used, total) in memory_in_use().items():
            if device not in told or abs(used - told[device]) > LEAST_CHANGE * total:
                with suppress(OSError):  # a full disk ends the stage where it writes what counts
                    log.emit("memory", device=device, used=used, total=total)
                told[device] = used
