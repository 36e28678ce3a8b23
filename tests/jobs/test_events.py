"""Event streams: what is written can be read, and nothing that may stand in such a file breaks a reader."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from dittocache import events as events_module
from dittocache.events import Event, EventLog, EventReader, follow_events, last_events, parse_event, read_events
from dittocache.jobs.following.fold import view_of
from dittocache.jobs.following.follower import RunFollower
from dittocache.jobs.following.history import list_runs, losses_of
from dittocache.jobs.reporting import Findings
from dittocache.jobs.run_folder import run_status
from dittocache.jobs.terminal import TerminalListener


def typical(log_path: Path) -> list[bytes]:
    """The lines of a run with every kind of event."""
    workflow, latents, train = (EventLog(log_path, stage) for stage in ("workflow", "cache_latents", "train"))
    workflow.emit("stage_started", pid=1, command=["cache_latents", "train", "generate"], typed="dittocache train")
    latents.emit("stage_started", pid=2, command=["python"])
    latents.emit("progress", done=1, total=4, speed=2.0, eta=1.5, bytes=7)
    latents.emit("memory", device="cpu", used=5, total=9)
    latents.emit("result", encoded=3, reused=1, bytes_written=9, seconds=1.0, failed={"a.png": "torn"})
    latents.emit("stage_finished", seconds=2.0)
    train.emit("stage_started", pid=3, command=["python"])
    train.emit("result", resumed_from=0, steps=3)
    for step in range(1, 4):
        train.emit("metric", step=step, loss=1.0 / step, learning_rate=1e-4)
        train.emit("progress", done=step, total=3, speed=1.0, eta=3.0 - step)
    train.emit("result", validation={"step": 3, "pictures": [{"caption": "c", "source": None, "picture": "s/a.png"}]})
    train.message("naïve, 図", level="warning")
    train.emit("result", steps=3, seconds_per_step=0.5, words="done")
    train.emit("stage_finished", seconds=3.0)
    variants = [{"label": "TeaCache", "picture": "s/b.png", "seconds": 1.0}]
    EventLog(log_path, "generate").emit("stage_started", pid=4, command=["python"])
    edits = [{"base": "s/c.png", "caption": "c"}]
    EventLog(log_path, "generate").emit("result", edits=edits, compared=[{"variants": variants}])
    EventLog(log_path, "generate").emit("stage_failed", error="out of memory", hint="less", returncode=1)
    return log_path.read_bytes().splitlines(keepends=True)


JUNK = [
    b"", b"\n", b"null\n", b"[]\n", b"{}\n", b'"x"\n', b"12\n", b"\xff\xfe\x00\n", b"\x00" * 50, b"{" * 3000 + b"\n",
    b"[" * 200_000 + b"\n", b'{"time": ' + b"9" * 5000 + b', "stage": "train", "kind": "result"}\n',
    b'{"time": NaN, "stage": "train", "kind": "result"}\n', b'{"time": 1e300, "stage": "train", "kind": "result"}\n',
    b'{"time": 1, "stage": 5, "kind": "result"}\n', b'{"time": 1, "stage": "train", "kind": []}\n',
    b'{"time": 1, "stage": "train", "kind": "metric"}\n',
    b'{"time": 1, "stage": "train", "kind": "metric", "step": "x"}\n',
    b'{"time": 1, "stage": "train", "kind": "metric", "step": 1e400, "loss": 1}\n',
    b'{"time": 1, "stage": "train", "kind": "metric", "step": 2, "loss": "low"}\n',
    b'{"time": 1, "stage": "train", "kind": "progress", "done": null, "total": 3}\n',
    b'{"time": 1, "stage": "train", "kind": "progress", "done": 5, "total": 0, "eta": "soon"}\n',
    b'{"time": 1, "stage": "train", "kind": "stage_failed"}\n',
    b'{"time": 1, "stage": "train", "kind": "stage_finished"}\n',
    b'{"time": 1, "stage": "train", "kind": "stage_started", "command": 7}\n',
    b'{"time": 1, "stage": "workflow", "kind": "stage_started", "command": [[], {}]}\n',
    b'{"time": 1, "stage": "train", "kind": "message", "text": "\\ud800", "level": "loud"}\n',
    b'{"time": 1, "stage": "train", "kind": "message", "text": "[bold]x", "level": "loud"}\n',
    b'{"time": 1, "stage": "train", "kind": "result", "validation": {"step": "x", "pictures": 5}}\n',
    b'{"time": 1, "stage": "train", "kind": "result", "resumed_from": [], "steps": {}, "encoded": {}, "reused": 1}\n',
    b'{"time": 1, "stage": "generate", "kind": "result", "edits": [1, {"base": 4}], "compared": [{"variants": [5]}]}\n',
]  # fmt: skip


def spoilt(lines: list[bytes], randomness: random.Random) -> bytes:
    """A stream as it must never be: cut, torn, mixed, with other bytes in it."""
    lines = list(lines)
    for _ in range(randomness.randrange(8)):
        place = randomness.randrange(len(lines))
        match randomness.randrange(7):
            case 0:
                lines[place] = lines[place][: randomness.randrange(len(lines[place]) + 1)]
            case 1:
                lines.insert(place, randomness.choice(JUNK))
            case 2:
                other = randomness.randrange(len(lines))
                lines[place], lines[other] = lines[other], lines[place]
            case 3:
                changed = bytearray(lines[place] or b"x")
                changed[randomness.randrange(len(changed))] = randomness.randrange(256)
                lines[place] = bytes(changed)
            case 4:
                del lines[place]
                lines = lines or [b""]
            case 5:
                lines.insert(place, randomness.randbytes(randomness.randrange(200)))
            case 6:
                lines.insert(place, lines[randomness.randrange(len(lines))])
    stream = b"".join(lines)
    return stream[: randomness.randrange(len(stream) + 1)] if randomness.random() < 0.3 else stream


def test_a_thousand_spoilt_streams_break_no_reader(tmp_path: Path) -> None:
    lines = typical(tmp_path / "whole.jsonl")
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    path = run_dir / "events.jsonl"
    with open(os.devnull, "w") as nowhere:
        for seed in range(1000):
            path.write_bytes(spoilt(lines, random.Random(seed)))
            found = list(read_events(path))
            follower = RunFollower(run_dir)
            assert follower.poll() == found
            assert follower.view().state == run_status(run_dir).state == list_runs(run_dir.parent)[0].state
            losses_of(run_dir)
            Findings.gathered(found)
            with TerminalListener(Console(file=nowhere, force_terminal=seed % 50 == 0)) as listener:
                for event in found:
                    listener(event)


def test_a_whole_stream_is_read_whole(tmp_path: Path) -> None:
    lines = typical(tmp_path / "events.jsonl")
    assert [json.loads(line) for line in lines] == list(read_events(tmp_path / "events.jsonl"))


def test_a_good_event_behind_a_torn_one_is_kept(tmp_path: Path) -> None:
    """A writer was killed in mid-line, or the disk was full, and another writer went on behind it."""
    path = tmp_path / "events.jsonl"
    EventLog(path, "train").message("first")
    with path.open("ab") as stream:
        stream.write(b'{"time": 5, "stage": "train", "kind": "mess')
    EventLog(path, "train").message("second")
    assert [event["text"] for event in read_events(path)] == ["first", "second"]


def test_lines_longer_than_any_event_are_left_out_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "LONGEST_LINE", 300)
    path = tmp_path / "events.jsonl"
    log = EventLog(path, "train")
    reader = EventReader(path)
    log.message("before")
    log.message("x" * 1000)
    log.message("after")
    assert [event["text"] for event in reader.read()] == ["before", "after"]
    with path.open("ab") as stream:
        stream.write(b"y" * 1000)  # and its end is not there yet
    assert list(reader.read()) == []
    assert reader.offset >= path.stat().st_size - 300  # what was looked at is not looked at again
    with path.open("ab") as stream:
        stream.write(b"y\n")
    log.message("last")
    assert [event["text"] for event in reader.read()] == ["last"]


def test_reading_bit_by_bit_gives_the_same_as_reading_at_once(tmp_path: Path) -> None:
    stream = b"".join(typical(tmp_path / "whole.jsonl"))
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    found: list[Event] = list(reader.read())
    for start in range(0, len(stream), 37):
        with path.open("ab") as file:
            file.write(stream[start : start + 37])
        found += reader.read()
    assert found == list(read_events(tmp_path / "whole.jsonl"))
    assert view_of(found, live=False) == view_of(read_events(path), live=False)


def test_a_stream_that_begins_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    EventLog(path, "train").message("old, and rather long")
    assert len(list(reader.read())) == 1
    path.unlink()
    EventLog(path, "train").message("new")
    assert [event["text"] for event in reader.read()] == ["new"]
    assert reader.restarts == 1


def test_following_ends_with_the_last_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path, "train").message("one")
    assert [event["text"] for event in follow_events(path, lambda: True)] == ["one"]


def test_the_end_of_a_stream_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_events(path, 100) == []
    for number in range(100):
        EventLog(path, "train").message(f"message {number}")
    found = [event["text"] for event in last_events(path, 1000)]
    assert found == [f"message {number}" for number in range(100)][-len(found) :]
    assert 5 < len(found) < 15


def test_a_file_name_that_is_no_utf8_can_be_told(tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl", "train").message(os.fsdecode(b"caf\xe9.png"))
    assert [event["text"] for event in read_events(tmp_path / "events.jsonl")] == ["caf?.png"]


def test_an_unknown_kind_is_refused_while_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'finish' is unknown"):
        EventLog(tmp_path / "events.jsonl", "train").emit("finish")


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([
    "pid", "command", "done", "total", "speed", "eta", "bytes", "step", "loss", "device", "used", "level", "text",
    "error", "hint", "returncode", "seconds", "stopped", "stop_requests", "typed", "words", "encoded", "reused",
    "bytes_written", "failed", "samples", "held_out", "steps", "seconds_per_step", "resumed_from", "validation",
    "edits", "compared",
])  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["workflow", "train", "generate", "cache_text", "?"]),
            st.sampled_from(events_module.KINDS),
            st.dictionaries(FIELDS, VALUES, max_size=6),
        ),
        max_size=8,
    )
)
def test_whatever_the_fields_hold_what_is_read_can_be_shown(rows: list[tuple[str, str, dict[str, Any]]]) -> None:
    lines = [json.dumps({"time": 1.0, "stage": stage, "kind": kind, **fields}) for stage, kind, fields in rows]
    found = [event for line in lines if (event := parse_event(line.encode())) is not None]
    for live in (True, False):
        view_of(found, live)
    Findings.gathered(found)
    with open(os.devnull, "w") as nowhere, TerminalListener(Console(file=nowhere)) as listener:
        for event in found:
            listener(event)
