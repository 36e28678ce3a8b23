"""The event stream of a run: one JSON object a line in `events.jsonl`.

Jobs write it, the terminal and the Studio follow it. Each line is appended by a single `write` to a
file opened with `O_APPEND`, so several processes may write the same stream, and a process that is
killed leaves at most one torn line. Readers take what is an event and leave out the rest: torn lines,
other bytes, objects without what their kind needs. So whoever gets an event may use its fields.

Fields of every event: `time` (seconds since the epoch), `stage` (`validate`, `cache_latents`, ...),
`kind` (one of `KINDS`). The other fields depend on the kind:

    stage_started   pid, command
    progress        done, total, speed (items a second), eta (seconds); bytes written so far where a stage writes
    metric          step, and any number of named numbers (loss, learning_rate, ...)
    memory          device (`cuda:0`, `cpu`), used, total (bytes)
    message         level (info, warning, error), text
    result          any named values: what the stage found or made (counts, bytes, seconds, paths)
    stage_finished  seconds
    stage_failed    error, hint, returncode
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

KINDS = ("stage_started", "progress", "metric", "memory", "message", "result", "stage_finished", "stage_failed")
LEVELS = ("info", "warning", "error")
LONGEST_LINE = 16 * 2**20  # bytes; what is longer is no event of ours, and must not fill the reader's memory
LATEST_TIME = 1e11  # seconds since the epoch; beyond it no calendar goes

Event = dict[str, Any]

_BEGINNING = b'{"time": '  # of every line that an `EventLog` writes
_NEEDED = object()


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
            os.write(descriptor, line.encode(errors="replace"))  # a file's name need not be valid UTF-8
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


class EventReader:
    """Reads a stream bit by bit: each `read` yields what came since the one before.

    Args:
        path: the `events.jsonl` file, which need not exist yet.
        offset: byte to begin at.

    Attributes:
        restarts: how often the file was found shorter than what had been read of it, and was read from its beginning.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        self.restarts = 0
        self._too_long = False  # in the middle of a line that is left out

    def read(self) -> Iterator[Event]:
        """Yield the events whose lines are complete by now."""
        try:
            stream = self.path.open("rb")
        except OSError:  # not there yet, or not for us to read
            return
        with stream:
            if os.fstat(stream.fileno()).st_size < self.offset:
                self.offset, self._too_long = 0, False
                self.restarts += 1
            stream.seek(self.offset)
            yield from self._events(stream)

    def _events(self, stream: BinaryIO) -> Iterator[Event]:
        while line := stream.readline(LONGEST_LINE):
            complete = line.endswith(b"\n")
            if not complete and len(line) < LONGEST_LINE:
                return
            self.offset += len(line)
            event = parse_event(line) if complete and not self._too_long else None
            self._too_long = not complete
            if event is not None:
                yield event


def read_events(path: Path, offset: int = 0) -> Iterator[Event]:
    """Yield the events written so far, from byte `offset` on; what is no event is left out."""
    return EventReader(path, offset).read()


def last_events(path: Path, size: int) -> list[Event]:
    """The events in the last `size` bytes of a stream, however long it is."""
    try:
        offset = max(0, path.stat().st_size - size)
    except OSError:
        return []
    return list(read_events(path, offset))  # a line that is cut in two at the offset is no event, and left out


def follow_events(
    path: Path, finished: Callable[[], bool], poll_seconds: float = 0.1, offset: int = 0
) -> Iterator[Event]:
    """Yield events as they are appended from byte `offset` on, until `finished()` is true and the stream is drained."""
    reader = EventReader(path, offset)
    while True:
        last_round = finished()
        yield from reader.read()
        if last_round:
            return
        time.sleep(poll_seconds)


def parse_event(line: bytes) -> Event | None:
    """The event of a line; None where it is none, or lacks what its kind needs."""
    event = _json_object(line)
    if event is None and (start := line.rfind(_BEGINNING)) > 0:
        event = _json_object(line[start:])  # a writer was ended in mid-line, and another went on behind it
    if event is None or not _is_number(event.get("time")) or not isinstance(event.get("stage"), str):
        return None
    kind = event.get("kind")
    if not 0 <= event["time"] < LATEST_TIME or not isinstance(kind, str) or kind not in _FIELDS:
        return None
    for name, (fits, default) in _FIELDS[kind].items():
        if name not in event or not fits(event[name]):
            if default is _NEEDED:
                return None
            event[name] = default
    return event


def number_in(event: Mapping[str, Any], name: str) -> float | None:
    """The number in a field that not every event of its kind has; None where it is missing or no finite number."""
    value = event.get(name)
    return value if _is_number(value) else None


def _json_object(line: bytes) -> Event | None:
    try:
        value = json.loads(line.decode())
        if b"\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be shown anywhere
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number with hundreds of digits
        return False


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_level(value: Any) -> bool:
    return isinstance(value, str) and value in LEVELS


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and _is_finite(value)


_FIELDS: Mapping[str, Mapping[str, tuple[Callable[[Any], bool], Any]]] = {
    "stage_started": {"pid": (_is_whole, 0), "command": (_is_list_of_text, ())},
    "progress": {
        "done": (_is_count, _NEEDED),
        "total": (_is_count, _NEEDED),
        "speed": (_is_count, 0.0),
        "eta": (_is_count, 0.0),
    },
    "metric": {"step": (_is_count, _NEEDED)},
    "memory": {"device": (_is_text, _NEEDED), "used": (_is_count, _NEEDED), "total": (_is_count, _NEEDED)},
    "message": {"level": (_is_level, "info"), "text": (_is_text, _NEEDED)},
    "result": {},
    "stage_finished": {"seconds": (_is_count, 0.0)},
    "stage_failed": {"error": (_is_text, ""), "hint": (_is_text, ""), "returncode": (_is_whole, 1)},
}
"""What the fields of each kind hold, and what stands for one that is missing or holds something else."""
