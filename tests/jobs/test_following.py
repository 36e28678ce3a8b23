"""What pages show of a run: a function of its events and its living processes, the same in every tab."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dittocache.errors import StageError
from dittocache.events import Event, EventLog, read_events
from dittocache.jobs.following.fold import MOST_MESSAGES, RunFold, view_of
from dittocache.jobs.following.follower import RunFollower, log_tail
from dittocache.jobs.following.history import compare_losses, delete_run, list_runs, losses_of, summary_of, trash_run
from dittocache.jobs.following.losses import LossCurve
from dittocache.jobs.following.view import SampleView
from dittocache.jobs.memory_reports import memory_reports
from dittocache.jobs.run_folder import held_folder
from dittocache.jobs.run_names import dated_name


def begin(run_dir: Path, *stages: str) -> dict[str, EventLog]:
    logs = {stage: EventLog(run_dir / "events.jsonl", stage) for stage in ("workflow", *stages)}
    logs["workflow"].emit("stage_started", pid=1, command=list(stages), typed="dittocache train")
    return logs


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    follower = RunFollower(tmp_path)
    assert follower.view().state == "new" and follower.view().stage is None
    with held_folder(tmp_path):
        logs = begin(tmp_path, "cache_latents", "train", "generate")
        latents, train, generate = (logs[stage] for stage in ("cache_latents", "train", "generate"))
        follower.poll()
        assert [stage.state for stage in follower.view().stages] == ["waiting"] * 3
        latents.emit("stage_started", pid=1, command=[])
        latents.emit("result", encoded=0, reused=9, bytes_written=0, seconds=0.0, failed={})
        latents.emit("stage_finished", seconds=0.0)
        train.emit("stage_started", pid=2, command=["python"])
        train.emit("result", resumed_from=0, steps=4)
        for step in (1, 2):
            train.emit("metric", step=step, loss=1 / step, learning_rate=1e-4, seconds=0.5)
        train.emit("progress", done=2, total=4, speed=2.0, eta=1.0)
        for used in (5, 8, 6):
            train.emit("memory", device="cuda:0", used=used, total=10)
        train.message("a word", level="warning")
        rows = [{"name": "a", "caption": "red", "source": "in.png", "picture": "samples/step-2/a.png"}]
        train.emit("result", validation={"step": 2, "pictures": rows})
        follower.poll()
        view = follower.view()
        assert (view.state, view.typed) == ("running", "dittocache train")
        assert [stage.state for stage in view.stages] == ["reused", "running", "waiting"]
        assert view.stages[0].outcome == ("0 encoded, 9 reused",)
        assert view.stage == view.stages[1]
        assert (view.stage.done, view.stage.total, view.stage.speed, view.stage.eta) == (2, 4, 2.0, 1.0)
        assert view.stage.fraction == 0.5
        assert view.losses == ((1, 1.0), (2, 0.5))
        assert (view.metrics["learning_rate"], view.metrics["step"]) == (1e-4, 2)
        assert [(one.device, one.used, one.total, one.most) for one in view.memory] == [("cuda:0", 6, 10, 8)]
        assert [(one.stage, one.level, one.text) for one in view.messages] == [("train", "warning", "a word")]
        assert view.samples == (SampleView("samples/step-2/a.png", "red", "in.png", step=2),)
        train.emit("stage_finished", seconds=3.0)
        generate.emit("stage_started", pid=3, command=["python"])
        edits = [{"caption": "red", "source": "in.png", "target": "t.png", "base": "b.png", "lora": "l.png"}]
        variants = [{"label": "Step cache", "picture": "c.png", "seconds": 1.5}]
        generate.emit("result", edits=edits, held_out=True, words="2 edits")
        generate.emit("result", compared=[{"caption": "red", "variants": variants}])
        generate.emit("stage_finished", seconds=1.0)
        logs["workflow"].emit("stage_finished", seconds=5.0)
    view = follower.view()  # what was said last is taken in by itself
    assert view.state == "finished" and not view.memory
    assert [stage.fraction for stage in view.stages] == [1.0] * 3
    assert [(one.picture, one.label, one.seconds) for one in view.samples[1:]] == [
        ("b.png", "base", None),
        ("l.png", "lora", None),
        ("c.png", "Step cache", 1.5),
    ]
    assert view.results["generate"]["held_out"] is True
    later = RunFollower(tmp_path)
    later.poll()
    assert later.view() == view


def test_a_failure_is_shown_with_hint_and_log(tmp_path: Path) -> None:
    logs = begin(tmp_path, "cache_latents", "cache_text")
    for stage in ("cache_latents", "cache_text"):
        logs[stage].emit("stage_started", pid=2, command=["python"])
    logs["cache_text"].emit("stage_failed", error="out of memory", hint="lower it", returncode=1)
    logs["cache_latents"].emit("stage_failed", error="stopped on request", hint="", returncode=130, stopped=True)
    (tmp_path / "log.txt").write_text("".join(f"line {number}\n" for number in range(30)))
    follower = RunFollower(tmp_path)
    view = follower.view()
    assert view.state == "failed"  # the other stage was stopped because of it
    assert [stage.state for stage in view.stages] == ["stopped", "failed"]
    assert view.failure is not None
    assert (view.failure.stage, view.failure.error, view.failure.hint) == ("cache_text", "out of memory", "lower it")
    assert view.failure.log_tail.splitlines()[-1] == "line 29" and len(view.failure.log_tail.splitlines()) == 12
    assert log_tail(tmp_path, 2) == "line 28\nline 29"
    assert log_tail(tmp_path / "nowhere") == ""


def test_a_run_whose_process_is_gone_is_not_shown_as_running(tmp_path: Path) -> None:
    logs = begin(tmp_path, "train")
    logs["train"].emit("stage_started", pid=2, command=["python"])
    with held_folder(tmp_path):
        assert RunFollower(tmp_path).view().state == "running"
    view = RunFollower(tmp_path).view()
    assert (view.state, view.stages[0].state) == ("died", "died")
    assert view.failure is not None and "without a word" in view.failure.error


def test_a_training_that_goes_on_does_its_unsaved_steps_again(tmp_path: Path) -> None:
    for resumed_from, steps in ((0, range(1, 8)), (5, range(6, 11))):
        logs = begin(tmp_path, "train")
        logs["train"].emit("stage_started", pid=2, command=["python"])
        logs["train"].emit("result", resumed_from=resumed_from, steps=10)
        for step in steps:
            logs["train"].emit("metric", step=step, loss=float(resumed_from + step))
            if step % 5 == 0 or (step == 7 and not resumed_from):
                logs["train"].emit("result", validation={"step": step, "pictures": [{"picture": f"{step}.png"}]})
    view = RunFollower(tmp_path).view()
    assert view.losses == tuple((step, float(step if step <= 5 else step + 5)) for step in range(1, 11))
    assert [sample.step for sample in view.samples] == [5, 10]
    assert losses_of(tmp_path) == view.losses
    logs = begin(tmp_path, "train")  # begun anew
    logs["train"].emit("stage_started", pid=2, command=["python"])
    logs["train"].emit("result", resumed_from=0, steps=10)
    assert RunFollower(tmp_path).view().losses == ()


def test_what_a_view_holds_is_bounded(tmp_path: Path) -> None:
    fold = RunFold()
    for step in range(1, 20_001):
        fold.add({"time": 1.0, "stage": "train", "kind": "metric", "step": step, "loss": float(step)})
        if step % 10 == 0:
            fold.add({"time": 1.0, "stage": "train", "kind": "message", "level": "info", "text": "x"})
    view = fold.view(live=False)
    assert 1000 <= len(view.losses) <= 2000
    assert len(view.messages) == MOST_MESSAGES
    assert view.losses[-1][0] == 20_000


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 60), max_size=120), st.integers(2, 20))
def test_a_curve_has_the_mean_of_what_it_stands_for(steps: list[int], most: int) -> None:
    curve = LossCurve(most)
    kept: dict[int, float] = {}
    for number, step in enumerate(steps):
        curve.add(step, float(number))
        kept = {earlier: loss for earlier, loss in kept.items() if earlier < step} | {step: float(number)}
    points = curve.points()
    assert len(points) <= most
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert {step for step, _ in points} <= kept.keys()
    if len(kept) <= most and len(steps) <= most:
        assert dict(points) == kept


def test_two_tabs_show_the_same_whenever_they_were_opened(tmp_path: Path) -> None:
    logs = begin(tmp_path, "train")
    early, found = RunFollower(tmp_path), list[Event]()
    for step in range(1, 30):
        logs["train"].emit("metric", step=step, loss=1 / step)
        found += early.poll()
        late = RunFollower(tmp_path)
        late.poll()
        assert early.view() == late.view() == view_of(found, live=False)
    assert found == list(read_events(tmp_path / "events.jsonl"))


def train_run(root: Path, name: str, losses: list[float], end: str = "stage_finished") -> Path:
    logs = begin(root / name, "train")
    logs["train"].emit("stage_started", pid=2, command=["python"])
    logs["train"].emit("result", resumed_from=0, steps=10)
    for step, loss in enumerate(losses, start=1):
        logs["train"].emit("metric", step=step, loss=loss)
        logs["train"].emit("progress", done=step, total=10, speed=1.0, eta=1.0)
    if end == "stage_finished":
        logs["train"].emit(end, seconds=1.0)
        logs["workflow"].emit(end, seconds=1.0)
    elif end:
        logs["train"].emit(end, error="it broke", hint="", returncode=1)
    return root / name


def test_the_list_of_runs(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "nowhere") == []
    finished = train_run(tmp_path, "finished", [0.5, 0.25])
    train_run(tmp_path, "failed", [0.5], end="stage_failed")
    long = train_run(tmp_path, "long", [1.0] * 3000, end="")  # its beginning is far from its end
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "config.yaml").write_text("{}")
    (tmp_path / "no run").mkdir()
    pictures = finished / "samples" / "step-2"
    pictures.mkdir(parents=True)
    for number in range(6):
        (pictures / f"{number}.png").write_bytes(b"")
    runs = {run.name: run for run in list_runs(tmp_path)}
    assert list(runs) == ["long", "failed", "finished", "prepared"]
    assert {name: run.state for name, run in runs.items()} == {
        "long": "died",
        "failed": "failed",
        "finished": "finished",
        "prepared": "new",
    }
    assert (runs["failed"].stage, runs["failed"].detail) == ("train", "it broke")
    run = runs["finished"]
    assert (run.step, run.steps, run.loss, run.sample_count, len(run.samples)) == (2, 10, 0.25, 6, 4)
    assert run.started is not None and abs(run.started - time.time()) < 600
    assert (runs["long"].step, runs["long"].loss) == (3000, 1.0)
    assert runs["long"].started == next(read_events(long / "events.jsonl"))["time"]
    assert runs["prepared"].started is None


def test_the_last_loss_is_found_behind_much_that_was_told_since(tmp_path: Path) -> None:
    run_dir = train_run(tmp_path, "run", [0.5, 0.25])
    log = EventLog(run_dir / "events.jsonl", "generate")
    for _ in range(3000):
        log.message("a picture " * 30)
    assert (summary_of(run_dir).step, summary_of(run_dir).loss) == (2, 0.25)


def test_losses_side_by_side(tmp_path: Path) -> None:
    folders = [train_run(tmp_path, "a", [1.0, 0.5]), train_run(tmp_path, "b", [2.0]), train_run(tmp_path, "c", [])]
    assert compare_losses(folders) == {"a": ((1, 1.0), (2, 0.5)), "b": ((1, 2.0),)}


def test_only_a_run_that_is_not_at_work_can_be_taken_away(tmp_path: Path) -> None:
    run_dir = train_run(tmp_path, "run", [1.0])
    with held_folder(run_dir), pytest.raises(StageError, match="is at work"):
        trash_run(run_dir)
    with pytest.raises(StageError, match="no folder of a run"):
        delete_run(tmp_path)
    place = trash_run(run_dir)
    assert not run_dir.exists() and (place / "events.jsonl").is_file()
    assert list_runs(tmp_path) == []  # what lies in the trash is not listed
    place.rename(run_dir)
    assert summary_of(run_dir).state == "finished"
    delete_run(run_dir)
    assert not run_dir.exists() and list((tmp_path / ".trash").iterdir()) == []


def test_names_of_new_runs(tmp_path: Path) -> None:
    from datetime import date

    day = date(2026, 3, 1)
    assert dated_name(tmp_path, "my edit", day) == "2026-03-01-my-edit"
    (tmp_path / "2026-03-01-my-edit").mkdir()
    assert dated_name(tmp_path, "my edit", day) == "2026-03-01-my-edit-2"


def test_memory_is_told_while_a_stage_runs_and_not_again_where_nothing_changed(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "train")
    with memory_reports(log, first=0.001, interval=0.001):
        deadline = time.monotonic() + 30
        while not list(read_events(log.path)) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
    found = [event for event in read_events(log.path) if event["device"] == "cpu"]
    assert 1 <= len(found) < 5
    assert 0 < found[0]["used"] < found[0]["total"]
