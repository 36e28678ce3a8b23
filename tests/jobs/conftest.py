"""A tiny checkpoint, a small set of edits, and an interpreter that plays stages without loading anything."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dittocache.config import RunConfig, check_config
from dittocache.demo.tiny import save_tiny
from dittocache.events import EventLog
from dittocache.jobs.caching import cache_latents, cache_text
from dittocache.jobs.inputs import RunInputs

# Stands for `python -m dittocache.jobs.stage STAGE --run-dir DIR --lifeline N`: the scenario says what each stage does.
PLAYER = """#!{python}
import json, os, signal, subprocess, sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from dittocache.events import EventLog
stage = sys.argv[3]
run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
script = json.loads((run_dir.parent / "scenario.json").read_text()).get(stage, {{}})
log = EventLog(run_dir / "events.jsonl", stage)
def stop(number, frame):
    if script.get("deaf"):
        return
    log.emit("stage_failed", error="stopped on request", hint="", returncode=130, stopped=True)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
log.emit("stage_started", pid=os.getpid(), command=sys.argv)
for fields in script.get("results", []):
    log.emit("result", **fields)
for _ in range(script.get("children", 0)):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with (run_dir / "children").open("a") as children:
        children.write(f"{{child.pid}} ")
sys.stdout.write(script.get("stdout", ""))
sys.stderr.write(script.get("stderr", ""))
sys.stdout.flush(); sys.stderr.flush()
deadline = time.monotonic() + script.get("seconds", 0)
while time.monotonic() < deadline:
    time.sleep(0.02)
if "kill" in script:
    os.kill(os.getpid(), script["kill"])
if "failed" in script:
    log.emit("stage_failed", **script["failed"])
if script.get("code", 0) == 0:
    log.emit("stage_finished", seconds=0.1)
sys.exit(script.get("code", 0))
"""


@pytest.fixture
def play(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Write the scenario (stage -> what it does) and return the path of the interpreter that plays it."""

    def write(scenario: dict[str, Any]) -> str:
        (tmp_path / "scenario.json").write_text(json.dumps(scenario))
        player = tmp_path / "player"
        player.write_text(PLAYER.format(python=sys.executable, paths=[path for path in sys.path if path]))
        player.chmod(0o755)
        return str(player)

    return write


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen-image-edit-plus")


def draw_set(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of `count` edits: noise to noise."""
    randomness = random.Random(seed)
    for number in range(count):
        for part in ("training_images", "control_images"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            small = Image.frombytes("RGB", (6, 6), randomness.randbytes(108))
            small.resize((64, 64)).save(folder / part / f"edit-{number}.png")
        (folder / "training_images" / f"edit-{number}.txt").write_text(f"make it number {number}\n")
    return folder


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> RunConfig:
    """A run on the tiny checkpoint: 4 samples, 2 held out, everything in the test's own folder."""
    return tiny_run(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def encoded_store(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The cache of a run like `config`, encoded once for all tests."""
    run = tiny_run(tmp_path_factory.mktemp("encoded"), tiny_model)
    for stage, encode in (("cache_latents", cache_latents), ("cache_text", cache_text)):
        encode(RunInputs(run, run.run_dir), EventLog(run.run_dir / "events.jsonl", stage))
    assert isinstance(run.cache.cache_dir, Path)
    return run.cache.cache_dir


@pytest.fixture
def encoded(config: RunConfig, encoded_store: Path) -> None:
    """The records of `config` are there before the test begins: for tests of what comes after caching."""
    assert isinstance(config.cache.cache_dir, Path)
    shutil.copytree(encoded_store, config.cache.cache_dir, ignore=shutil.ignore_patterns("roots", "leases", "*.json"))


def tiny_run(tmp_path: Path, tiny_model: Path) -> RunConfig:
    """The settings of such a run, its data sets drawn."""
    return check_config(
        {
            "name": "tiny",
            "output_dir": tmp_path / "runs",
            "held_out": draw_set(tmp_path / "heldout", 2, seed=1),
            "model": {"path": str(tiny_model), "dtype": "float32", "device": "cpu"},
            "data": {"path": draw_set(tmp_path / "data", 4), "resolution": 64, "condition_resolution": 32},
            "cache": {"cache_dir": tmp_path / "cache"},
            "train": {"steps": 3, "rank": 2, "checkpoint_every": 1},
            "generate": {"num_inference_steps": 4},
            "teacache": {"rel_l1_thresh": 1e6, "coefficients": [1.0, 0.0]},
            "reference_kv": {"refresh": 2},
        }
    )
