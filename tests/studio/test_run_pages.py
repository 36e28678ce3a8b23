"""Pages Runs and Reports: what is deleted and what never is, and what a report may do in the browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from dittocache.config import check_config, save_config
from dittocache.errors import AccessError, StageError
from dittocache.events import EventLog
from dittocache.jobs.run_folder import held_folder
from dittocache.studio.report_files import endpoints, report_url, run_reports, write_report
from dittocache.studio.run_history import LossCurves, all_runs, delete_run
from dittocache.studio.safety import SafetyMiddleware
from dittocache.studio.state import Studio

EVIL = "<script>document.title = 'run'</script><img src=https://evil.example/x.png>"


def _run(studio: Studio, name: str, losses: list[float] | None = None) -> Path:
    folder = studio.runs_dir / name
    save_config(check_config({"model": {"path": "bundled"}, "data": {"path": "data"}}), folder / "config.yaml")
    log = EventLog(folder / "events.jsonl", "train")
    log.emit("stage_started", pid=0, command=[])
    for step, loss in enumerate(losses or [], start=1):
        log.emit("metric", step=step, loss=loss)
    return folder


def _client(studio: Studio) -> TestClient:
    app = FastAPI(openapi_url=None)
    for path, answer in endpoints(studio).items():
        app.get(path)(answer)
    return TestClient(SafetyMiddleware(app, studio.access), base_url="http://localhost:8080")


def test_only_a_run_of_this_studio_is_deleted(studio: Studio) -> None:
    outside = _run(studio, "kept")
    (studio.runs_dir / "link").symlink_to(outside)
    precious = studio.base / "precious"
    precious.mkdir()
    (precious / "events.jsonl").write_text("")
    for name in ("../precious", "..", ".", "", "kept/../../precious", "link/../../precious", str(precious)):
        with pytest.raises((AccessError, StageError)):
            delete_run(studio, name)
    assert precious.is_dir() and outside.is_dir()
    delete_run(studio, "kept")
    assert not outside.exists()


def test_a_run_at_work_is_not_deleted(studio: Studio) -> None:
    folder = _run(studio, "busy")
    with held_folder(folder), pytest.raises(StageError):
        delete_run(studio, "busy")
    assert (folder / "events.jsonl").is_file()


def test_losses_are_read_again_only_where_a_run_went_on(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _run(studio, "first", [0.5, 0.4])
    _run(studio, "second", [0.7])
    _run(studio, "nothing")
    curves = LossCurves()
    runs = all_runs(studio)
    assert curves.of(runs) == {"first": ((1, 0.5), (2, 0.4)), "second": ((1, 0.7),)}
    EventLog(first / "events.jsonl", "train").emit("metric", step=3, loss=0.3)
    read: list[str] = []
    original = Path.open

    def opened(path: Path, *more: object, **options: object) -> object:
        read.append(path.parent.name)
        return original(path, *more, **options)  # type: ignore[call-overload]

    runs = all_runs(studio)
    monkeypatch.setattr(Path, "open", opened)
    assert curves.of(runs)["first"] == ((1, 0.5), (2, 0.4), (3, 0.3))
    assert set(read) <= {"first"}


def test_a_report_does_nothing_but_show_itself(studio: Studio) -> None:
    folder = _run(studio, "evil")
    (folder / "report.html").write_text(EVIL)
    (report,) = run_reports(studio)
    answer = _client(studio).get(report_url(report))
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy and "sandbox" in policy
    assert not any("script-src" in directive or "http" in directive for directive in policy)


def test_nothing_but_reports_inside_the_folders_is_served(studio: Studio, tmp_path: Path) -> None:
    folder = _run(studio, "good")
    (tmp_path / "report.html").write_text("outside")
    (folder / "link").mkdir()
    (folder / "link" / "report.html").symlink_to(tmp_path / "report.html")
    client = _client(studio)
    for path, status in (
        (tmp_path / "report.html", 403),
        (folder / "link" / "report.html", 403),
        (folder / ".." / ".." / ".." / "report.html", 403),
        ("/etc/passwd", 403),
        (folder / "config.yaml", 404),
        (folder / "report.html", 404),
        (folder, 404),
    ):
        assert client.get("/report", params={"path": str(path)}).status_code == status, path


def test_a_report_that_is_behind_its_run_says_so(studio: Studio) -> None:
    folder = _run(studio, "run")
    assert [(report.written, report.behind) for report in run_reports(studio)] == [(None, False)]
    (folder / "report.html").write_text("report")
    EventLog(folder / "events.jsonl", "report").emit("stage_finished", seconds=1.0)
    assert [report.behind for report in run_reports(studio)] == [False]
    EventLog(folder / "events.jsonl", "train").emit("metric", step=1, loss=0.5)
    assert [report.behind for report in run_reports(studio)] == [True]


def test_a_report_is_written_beside_the_run_and_says_nothing_in_its_stream(studio: Studio, edits: Path) -> None:
    folder = _run(studio, "run", [0.5, 0.4])
    settings = {"model": {"path": "bundled"}, "data": {"path": str(edits), "resolution": 64}}
    save_config(check_config(settings), folder / "config.yaml")
    EventLog(folder / "events.jsonl", "train").emit("result", steps=2, seconds_per_step=0.1)
    before = (folder / "events.jsonl").read_bytes()
    write_report(studio, folder)
    assert "make number" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "events.jsonl").read_bytes() == before, "the training stays the last thing that the run did"


def test_no_report_shows_data_from_outside(studio: Studio, edits: Path, tmp_path: Path) -> None:
    for settings in ({"data": {"path": str(tmp_path)}}, {"data": {"path": str(edits)}, "held_out": str(tmp_path)}):
        folder = _run(studio, "run", [0.5])
        save_config(check_config({"model": {"path": "bundled"}, **settings}), folder / "config.yaml")
        with pytest.raises(AccessError):
            write_report(studio, folder)
        assert not (folder / "report.html").exists()
