"""The event stream of a run: one JSON object a line in `events.jsonl`.

Jobs write it, the terminal and the Studio follow it. Each line is appended by a single `write` to a
file opened with `O_APPEND`, so several processes may write the same stream, and a process that is
killed leaves at most one torn last line, which readers skip.

Fields of every event: `time` (seconds since the epoch), `stage` (`validate`, `cache_latents`, ...),
`kind` (one of `KINDS`). The other fields depend on the kind:

    stage_started   pid, command
    progress        done, total, speed (items a second), eta (seconds); bytes written so far where a stage writes
    metric          step, and any number of named numbers (loss, learning_rate, ...)
    message         level (info, warning, error), text
    result          any named values: what the stage found or made (counts, bytes, seconds, paths)
    stage_finished  seconds
    stage_failed    error, hint, returncode
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KINDS = ("stage_started", "progress", "metric", "message", "result", "stage_finished", "stage_failed")

Event = dict[str, Any]


class EventLog:
    """Appends events of one stage to a run's stream.

    Args:
        path: the `events.jsonl` file; it and its folder are created when missing.
        stage: the stage that every event of this log belongs to.
        listener: called with every event after it is written (terminal progress, tests).
    """

    def __init__(self, path: Path, stage: str, listener: Callable[[Event], None] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.stage = stage
        self._listener = listener

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event. Raises ValueError for an unknown kind and TypeError for a value that JSON cannot hold."""
        if kind not in KINDS:
            raise ValueError(f"event kind {kind!r} is unknown; expected one of {', '.join(KINDS)}")
        event: Event = {"time": time.time(), "stage": self.stage, "kind": kind, **fields}
        line = json.dumps(event, ensure_ascii=False, allow_nan=True) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        if self._listener is not None:
            self._listener(event)

    def message(self, text: str, level: str = "info") -> None:
        """Append a line of plain words; `level` is info, warning or error."""
        self.emit("message", level=level, text=text)


class Progress:
    """Reports `done` of `total` with speed and ETA, at most every `interval` seconds.

    Speed is measured over this run's own items, so that a resumed stage does not promise the speed of
    items that were already there.
    """

    def __init__(self, log: EventLog, total: int, interval: float = 0.5) -> None:
        self.log = log
        self.total = total
        self.done = 0
        self.bytes = 0
        self._interval = interval
        self._started = time.monotonic()
        self._reported = 0.0

    def advance(self, items: int = 1, written_bytes: int = 0) -> None:
        """Count `items` more as done, and what was written for them, and report when it is time."""
        self.done += items
        self.bytes += written_bytes
        now = time.monotonic()
        if self.done < self.total and now - self._reported < self._interval:
            return
        self._reported = now
        speed = self.done / max(now - self._started, 1e-9)
        eta = (self.total - self.done) / max(speed, 1e-9)
        written = {"bytes": self.bytes} if self.bytes else {}
        self.log.emit("progress", done=self.done, total=self.total, speed=speed, eta=eta, **written)


def read_events(path: Path, offset: int = 0) -> Iterator[Event]:
    """Yield the events written so far, from byte `offset` on; a torn last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # a writer was killed in mid-line and another went on behind it


def follow_events(
    path: Path, finished: Callable[[], bool], poll_seconds: float = 0.1, offset: int = 0
) -> Iterator[Event]:
    """Yield events as they are appended from byte `offset` on, until `finished()` is true and the stream is drained."""
    while True:
        last_round = finished()
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError:
                        continue
        if last_round:
            return
        time.sleep(poll_seconds)
