"""The command line: help a newcomer understands, plain errors, exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tests.jobs.conftest import draw_set

from dittocache import main
from dittocache.cli import app as cli
from dittocache.cli import shared
from dittocache.config import RunConfig, check_config, load_config, save_config
from dittocache.demo.model import SAMPLES_DIR
from dittocache.demo.tiny import save_tiny
from dittocache.errors import CacheError
from dittocache.jobs.demo_job import demo_config
from dittocache.jobs.results import describe_result
from dittocache.jobs.stages import CACHE, DEMO, TRAIN
from dittocache.jobs.terminal import TerminalListener
from dittocache.jobs.workflow import StageFailed, WorkflowStopped

COMMANDS = ("demo", "plan", "cache", "train", "generate", "report")


class Runs:
    """Stands for `run_workflow`: notes what it was asked for, raises what it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[RunConfig, tuple[str, ...]]] = []
        self.error: Exception | None = None

    def __call__(self, config: RunConfig, stages: Any, listener: Any, typed: str = "") -> Path:
        self.asked.append((config, tuple(stages)))
        if self.error is not None:
            raise self.error
        return config.run_dir


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    recorder = Runs()
    monkeypatch.setattr(shared, "run_workflow", recorder)
    return recorder


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": "bundled"}, "data": {"path": "pictures"}}))
    return str(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: dittocache {command}" in text
    if command != "demo":
        assert "--train.steps: Optimizer steps. [1000]" in text
        assert "Required" in text


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert "Start with dittocache demo" in " ".join(text.split())


def test_a_misspelt_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["trian"]) == 2
    assert 'Did you mean "train"?' in " ".join(capsys.readouterr().err.split())


def test_misspelt_options_and_settings_get_suggestions(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "--confg", config_file]) == 2
    assert "did you mean --config where you wrote --confg?" in capsys.readouterr().err
    assert cli.run(["train", "--config", config_file, "--train.stpes", "5", "--cache.batch_size", "many"]) == 2
    error = capsys.readouterr().err
    assert "2 problem(s) with the settings" in error
    assert "did you mean train.steps?" in error
    assert "cache.batch_size: found 'many'" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "stages"),
    [("cache", CACHE), ("train", TRAIN), ("generate", ("generate",)), ("report", ("report",))],
)
def test_commands_run_their_stages_with_overrides(
    command: str, stages: tuple[str, ...], config_file: str, runs: Runs
) -> None:
    assert cli.run([command, "--config", config_file, "--train.steps", "7", "--name=other"]) == 0
    [(config, asked)] = runs.asked
    assert asked == stages
    assert (config.train.steps, config.name) == (7, "other")


def test_training_without_the_cache_encodes_nothing(config_file: str, runs: Runs) -> None:
    assert cli.run(["train", "--config", config_file, "--cache.use_cache", "false"]) == 0
    assert runs.asked[0][1] == ("validate", "train")


@pytest.mark.parametrize("command", ["train", "cache", "generate", "report"])
def test_a_data_set_and_a_model_need_no_yaml(
    command: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(SAMPLES_DIR / "train"), "--model", "bundled", "--train.rank", "3", "--name", "first"]
    assert cli.run([command, *words]) == 0
    config = runs.asked[0][0]
    assert (config.data.path, config.model.path) == (SAMPLES_DIR / "train", "bundled")
    assert (config.train.rank, config.run_dir) == (3, Path("runs/first"))
    captured = capsys.readouterr()
    assert "run runs/first: 40 samples" in captured.err, "what is chosen is said, beside the result"
    assert "samples" not in captured.out.replace("runs/first/samples", "")


def test_a_picture_from_a_prompt_needs_a_model_alone(
    runs: Runs, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", "bundled", "--generate.prompt", "make the wall green", "--generate.image", "room.png"]
    assert cli.run(["generate", *words, "--teacache.gate", "error"]) == 0
    config, stages = runs.asked[0]
    assert stages == ("generate",) and config.data.paths == [] and config.generate.image == [Path("room.png")]
    assert config.data.side == 128, "the bundled model's own size"
    assert config.teacache is not None and config.teacache.gate == "error"
    assert cli.run(["generate", "--model", "bundled"]) == 2
    assert "`dittocache generate` needs none with --generate.prompt" in capsys.readouterr().err
    assert cli.run(["train", *words]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert cli.run(["generate", "--model", "nowhere/at-all", "--generate.promt", "a", "--generate.prompt", "b"]) == 2
    error = capsys.readouterr().err
    assert "did you mean generate.prompt?" in error and "nowhere" in error


def test_data_and_model_in_place_of_those_of_a_config(config_file: str, runs: Runs) -> None:
    assert cli.run(["train", "--config", config_file, "--data", "other", "--model=elsewhere"]) == 0
    config = runs.asked[0][0]
    assert (config.data.path, config.model.path) == (Path("other"), "elsewhere")


def test_two_words_for_one_thing_must_agree(config_file: str, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "--config", config_file, "--data", "a", "--data.path", "b"]) == 2
    assert "--data is 'a' but --data.path is 'b'; they mean the same: keep one" in capsys.readouterr().err
    assert cli.run(["train", "--config", config_file, "--data", "a", "--data.path", "a"]) == 0


def test_a_run_is_found_by_its_name(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", "--name", "mine"]) == 2
    assert "there is no run runs/mine; give --config FILE, or --data FOLDER and --model PATH" in capsys.readouterr().err
    content = {"name": "mine", "model": {"path": "bundled"}, "data": {"path": "pictures"}, "train": {"steps": 5}}
    save_config(check_config(content), tmp_path / "runs" / "mine" / "config.yaml")
    assert cli.run(["generate", "--name", "mine", "--train.rank", "2"]) == 0
    assert (runs.asked[0][0].train.steps, runs.asked[0][0].train.rank) == (5, 2)


def test_what_is_missing_is_said_with_what_is_wrong(capsys: pytest.CaptureFixture[str], runs: Runs) -> None:
    assert cli.run(["train"]) == 2
    assert "--data FOLDER and --model PATH without any" in capsys.readouterr().err
    assert cli.run(["train", "--data", "nowhere", "--train.stpes", "5"]) == 2
    error = capsys.readouterr().err
    assert "--model is missing" in error and "did you mean train.steps?" in error and "nowhere" in error
    assert not runs.asked


def test_the_demo_ends_with_the_reports_path(runs: Runs, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["demo", "--output_dir", str(tmp_path)]) == 0
    assert runs.asked[0][1] == DEMO
    assert capsys.readouterr().out.strip().endswith(f"report: {tmp_path / 'demo' / 'report.html'}")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StageFailed("stage validate failed", 2), 2),
        (StageFailed("stage train failed", -9), 1),
        (WorkflowStopped("stage train was stopped"), 130),
        (CacheError("the cache is broken"), 1),
    ],
)
def test_errors_are_plain_words_and_codes(
    error: Exception, code: int, config_file: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.error = error
    assert cli.run(["train", "--config", config_file]) == code
    captured = capsys.readouterr().err
    assert captured.strip() == str(error)


def test_plan_in_words_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(save_tiny(tmp_path / "model", "qwen-image-edit-plus")), "dtype": "float32"},
        "data": {"path": str(draw_set(tmp_path / "data", 2)), "resolution": 64, "condition_resolution": 32},
        "cache": {"cache_dir": str(tmp_path / "cache")},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert cli.run(["plan", "--config", str(file)]) == 0
    assert "2 samples need 13 records: 0 are cached" in capsys.readouterr().out
    assert cli.run(["plan", "--config", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["hits"], found["misses"]) == (0, 13)
    assert not (tmp_path / "runs").exists()
    assert cli.run(["plan", "--config", str(file), "--data.path", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "stages"), [(["--cache"], CACHE), ([], TRAIN)])
def test_the_specified_way_in(words: list[str], stages: tuple[str, ...], config_file: str, runs: Runs) -> None:
    assert main.main(["--config", config_file, *words]) == 0
    assert runs.asked[0][1] == stages


@pytest.mark.parametrize("module", ["dittocache", "dittocache.main"])
def test_modules_can_be_run(module: str) -> None:
    command = [sys.executable, "-m", module, "--help" if module == "dittocache" else "--config"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == (0 if module == "dittocache" else 2)
    assert "Traceback" not in ended.stderr


def test_the_demo_job_is_the_shipped_config() -> None:
    shipped = load_config(Path("configs/demo.yaml"))
    built = demo_config()
    assert built.model_dump(exclude={"data": {"path"}, "held_out": True}) == shipped.model_dump(
        exclude={"data": {"path"}, "held_out": True}
    )
    assert built.data.path.resolve() == shipped.data.path.resolve()


class TestTerminal:
    def shown(self, *events: dict[str, Any]) -> str:
        console = Console(width=200, record=True, file=io.StringIO())
        with TerminalListener(console) as listener:
            for event in events:
                listener({"time": 0.0, **event})
        return console.export_text()

    def test_a_stage_from_start_to_end(self) -> None:
        text = self.shown(
            {"stage": "workflow", "kind": "stage_started", "command": []},
            {"stage": "cache_text", "kind": "stage_started", "command": ["python"]},
            {"stage": "cache_text", "kind": "message", "level": "warning", "text": "one [bad] picture"},
            {"stage": "cache_text", "kind": "progress", "done": 1, "total": 2, "speed": 3.0, "eta": 5000.0},
            {
                "stage": "cache_text",
                "kind": "result",
                "encoded": 3,
                "reused": 4,
                "bytes_written": 2_000_000,
                "failed": {"x": "y"},
            },
            {"stage": "cache_text", "kind": "stage_finished", "seconds": 75.0},
        )
        assert text.splitlines() == [
            "Encoding prompts ...",
            "  one [bad] picture",
            "  done: 3 encoded, 4 reused; 2.0 MB written; 1 pictures left out in 1:15 min",
        ]

    def test_a_stage_with_nothing_to_do(self) -> None:
        text = self.shown(
            {"stage": "cache_text", "kind": "stage_started", "command": []},
            {
                "stage": "cache_text",
                "kind": "result",
                "encoded": 0,
                "reused": 40,
                "bytes_written": 0,
                "failed": {},
            },
            {"stage": "cache_text", "kind": "stage_finished", "seconds": 0.0},
        )
        assert text.strip() == "Encoding prompts: 0 encoded, 40 reused"

    def test_without_a_screen_a_line_a_minute_says_how_far_it_is(self) -> None:
        stage = {"stage": "train"}
        steps = [
            {"kind": "progress", "time": at, "done": at, "total": 130, "speed": 1.0, "eta": 130.0 - at, **stage}
            for at in range(1, 131)
        ]
        text = self.shown(
            {"kind": "stage_started", "command": ["python"], **stage},
            {"kind": "metric", "step": 1, "loss": 0.25, **stage},
            *steps,
            {"kind": "stage_finished", "seconds": 130.0, **stage},
        )
        assert text.splitlines() == [
            "Training the LoRA ...",
            "  60 of 130: loss 0.2500, 1.0/s, 1:10 min left",
            "  120 of 130: loss 0.2500, 1.0/s, 10.0 s left",
            "  done in 2:10 min",
        ]

    def test_results_of_no_interest_say_nothing(self) -> None:
        assert describe_result({"kind": "result", "resumed_from": 0, "steps": 3}) == []
