"""Stop between batches: a signal waits until what is being encoded is stored."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """Holds back SIGINT (Ctrl-C) and SIGTERM until `deliver`; a second one goes through at once.

    A delivered signal does what it would have done outside: KeyboardInterrupt, the end of the process, or the caller's
    own handler. Outside the main thread, where Python delivers no signals, nothing is held.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler is not None and handler != signal.SIG_IGN:  # None: not installed from Python
                    self._previous[number] = handler
                    signal.signal(number, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None:
            self.deliver()

    def deliver(self) -> None:
        """Let a signal that came meanwhile take effect."""
        if self.pending is not None:
            number, self.pending = self.pending, None
            self._restore()
            signal.raise_signal(number)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        impatient = self.pending is not None
        self.pending = number
        if impatient:
            self.deliver()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
