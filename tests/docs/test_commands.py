"""Every command and every piece of Python in README and docs works as written, short of the heavy work itself."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.training import parse_row

import dittocache
from dittocache import main
from dittocache.cli import app as cli
from dittocache.cli import shared
from dittocache.config import RunConfig, check_config
from dittocache.jobs import quick_start
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.stages import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/gpu/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)(?P<path>[^)#]+)")


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block in one of these languages."""
    return [
        (page.name, found["body"])
        for page in PAGES
        for found in BLOCK.finditer(page.read_text())
        if found["language"] in languages
    ]


def commands() -> list[Any]:
    """Every command line, its comment and prompt taken off."""
    found = []
    for page, body in blocks("bash", "console", "sh", "shell"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if words:
                found.append(pytest.param(words, id=f"{page}: {' '.join(words)[:70]}"))
    return found


WITHOUT_WORKFLOW = {"verify", "pack", "gc", "clear", "inspect", "import", "export"}  # carried out by test_commands_run


class Asked:
    """Stands for the workflow: what it was asked to do is checked, nothing is done."""

    def __init__(self) -> None:
        self.stages: tuple[str, ...] = ()

    def __call__(self, config: RunConfig, stages: Any, listener: Any, typed: str = "") -> Path:
        self.stages = tuple(stages)
        assert set(self.stages) <= STAGES.keys()
        return config.run_dir


class NoPlan:
    """Stands for a plan: the checkpoint of the page is not on this machine."""

    def describe(self) -> str:
        return "planned"


def settings_of_words(
    data: str, model: str, overrides: dict[str, Any], notice: Any, named_cache: str | None
) -> RunConfig:
    """Stands for the settings chosen for a data set and a model that are not on this machine."""
    return check_config({}, {**overrides, "data.path": data, "model.path": model}, named_cache=named_cache)


@pytest.mark.parametrize("words", commands())
def test_commands(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    asked = Asked()
    monkeypatch.setattr(shared, "run_workflow", asked)
    monkeypatch.setattr(RunInputs, "plan", lambda self: NoPlan())
    monkeypatch.setattr(quick_start, "quick_config", settings_of_words)
    monkeypatch.setattr(shared, "_config_of_run", lambda overrides: Path("configs/demo.yaml"))
    if words[:2] == ["dittocache", "cache"] and words[2] in WITHOUT_WORKFLOW:
        command, _, _ = cli.app.parse_args(words[1:], exit_on_error=False, print_error=False)
        assert command.__name__.rstrip("_") == words[2]
    elif words[:2] == ["dittocache", "studio"]:  # it would listen until it is ended; tests/studio start it
        command, _, _ = cli.app.parse_args(words[1:], exit_on_error=False, print_error=False)
        assert command.__name__ == "studio"
    elif words[:2] == ["dittocache", "queue"]:  # carried out by tests/cli/test_queue.py and tests/jobs/test_queue.py
        command, _, _ = cli.app.parse_args(words[1:], exit_on_error=False, print_error=False)
        assert command.__name__.removesuffix("_jobs") == words[2]
    elif words[0] == "dittocache":
        assert cli.run(words[1:]) == 0
        assert asked.stages or "planned" in capsys.readouterr().out
    elif "dittocache.main" in words:
        assert words[0] in ("python", "torchrun", "srun")
        assert main.main(words[words.index("dittocache.main") + 1 :]) == 0
        assert asked.stages
    elif words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(words[2:])
        assert (words[1], launched.module, launched.training_script) == ("launch", True, "dittocache.jobs.stage")
        stage, option, _ = launched.training_script_args
        assert stage in STAGES and option == "--run-dir"
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks.gpu."):
        options = importlib.import_module(words[2]).parser().parse_args(words[3:])
        assert [parse_row(text, 8) for text in getattr(options, "rows", ["cached"])]
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        assert Path(words[1]).is_file()
    elif words[0] == "make":
        # The environment's stamp decides what else `make -n` would print; only the target itself is looked at.
        done = subprocess.run(["make", "-n", *words[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif words[:3] == [".venv/bin/python", "-m", "pytest"]:
        collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", *words[3:]]
        assert subprocess.run(collect, capture_output=True, check=False).returncode == 0
    elif words[0] == "hf":
        assert shutil.which("hf", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert words[1] == "download"
    elif words[0].startswith("."):
        assert os.access(words[0], os.X_OK)
        assert subprocess.run(["bash", "-n", words[0]], check=False).returncode == 0
    else:
        pytest.fail(f"no check for {words[0]!r}: add one, so that every command of the docs is run or checked")


def test_there_are_commands_on_every_page_that_has_tasks() -> None:
    pages = {page for page, _ in blocks("bash", "console", "sh", "shell")}
    named = {"README.md", "getting-started.md", "embedding-cache.md", "sampling-caches.md", "training.md"}
    assert named <= pages


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_uses_what_exists(page: str, code: str) -> None:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{page}: {node.module} has no {missing}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dittocache":
            assert node.attr in dittocache.__all__, f"{page}: dittocache.{node.attr} is not public"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            _check_settings(node)


def _check_settings(call: ast.Call) -> None:
    """Keyword arguments of our settings classes are settings."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name.endswith("Config") and name in dittocache.__all__:
        fields = getattr(dittocache, name).model_fields
        assert {keyword.arg for keyword in call.keywords} <= set(fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link["path"] for link in LINK.finditer(page.read_text()) if not (page.parent / link["path"]).exists()]
    assert not missing
