"""Turn SIGINT and SIGTERM into a question that a loop asks between steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SAME_REQUEST_SECONDS = 2.0
"""A launcher passes on the Ctrl-C that the terminal has already sent to its processes: that is not a second one."""


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yield a `should_stop` that is true once SIGINT or SIGTERM has come; a later SIGINT interrupts at once.

    The former handlers come back at the end. Only the main thread may use it (Python's rule for signal handlers).
    """
    received: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(time.monotonic())
        if number == signal.SIGINT and received[-1] - received[0] > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
