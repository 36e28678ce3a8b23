"""`dittocache queue`: what it says and does, short of starting anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dittocache.cli import app as cli
from dittocache.jobs.queue import runner
from dittocache.jobs.queue.folder import Queue


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DITTOCACHE_QUEUE", str(tmp_path / "queue"))
    monkeypatch.setattr(runner, "ensure_runner", lambda queue: False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    settings = {"model": {"path": "bundled", "device": "cpu"}, "data": {"path": "pictures"}}
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_jobs_are_added_listed_and_removed(
    config_file: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(["queue", "add", "--config", config_file, "--name", "one", "--train.steps", "7"]) == 0
    assert cli.run(["queue", "add", "--config", config_file, "--name", "two", "--do", "generate"]) == 0
    assert capsys.readouterr().out.split() == ["1", "2"]
    assert cli.run(["queue", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["number"], row["state"], row["stages"][-1]) for row in rows] == [
        (1, "waiting", "train"),
        (2, "waiting", "generate"),
    ]
    assert rows[0]["run_dir"] == str(tmp_path / "runs" / "one")
    job = Queue().waiting()[0]
    assert (job.settings().train.steps, job.cwd) == (7, str(tmp_path))
    assert cli.run(["queue", "remove", "1"]) == 0
    assert cli.run(["queue", "list"]) == 0
    out = capsys.readouterr().out
    assert "generate" in out and "waiting" in out and "one" not in out


def test_training_without_the_cache_encodes_nothing(config_file: str) -> None:
    assert cli.run(["queue", "add", "--config", config_file, "--cache.use_cache", "false"]) == 0
    assert Queue().waiting()[0].stages == ["validate", "train"]


def test_what_cannot_be_done_is_said(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["queue", "add", "--config", config_file, "--model.device", "cuda:77"]) == 2
    assert "model.device" in capsys.readouterr().err
    assert cli.run(["queue", "stop", "5"]) == 1
    assert "there is no job 5" in capsys.readouterr().err
    assert cli.run(["queue", "add", "--config", config_file]) == 0
    assert cli.run(["queue", "stop", "1"]) == 1
    assert "dittocache queue remove 1" in capsys.readouterr().err
    assert cli.run(["queue", "clear"]) == 0
    assert "0 jobs" in capsys.readouterr().out
