"""Which process of a group this one is, and what it does then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dittocache.config import RunConfig, check_config, load_config
from dittocache.errors import ConfigError
from dittocache.events import read_events
from dittocache.jobs import process
from dittocache.jobs.ranks import Rank, device_of_worker, processes_to_train, rank_of
from dittocache.jobs.run_folder import held_folder
from dittocache.jobs.stages import CACHE, TRAIN
from dittocache.jobs.workflow import run_workflow

Play = Callable[[dict[str, Any]], str]


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}, Rank(3, 4, 3)),
        # torchrun inside a Slurm job: the launcher that is nearer counts.
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Rank(1, 2, 1)),
        ({"SLURM_LOCALID": "2"}, Rank(0, 1, 0)),
    ],
)
def test_the_rank_is_what_the_launcher_says(environment: dict[str, str], rank: Rank) -> None:
    assert rank_of(environment) == rank


@pytest.mark.parametrize("index", ["2", "-1", "one"])
def test_a_rank_that_cannot_be_is_an_error_that_names_the_variables(index: str) -> None:
    with pytest.raises(ConfigError, match=rf"RANK='{index}', WORLD_SIZE='2'.*below WORLD_SIZE"):
        rank_of({"RANK": index, "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("device", "position", "devices", "expected"),
    [
        ("cuda", 0, 4, "cuda:0"),
        ("cuda", 5, 4, "cuda:1"),
        ("cuda:1", 1, 2, "cuda:0"),
        ("cuda", 3, 1, "cuda"),  # Slurm shows each task one GPU
        ("cpu", 3, 0, "cpu"),
        ("mps", 1, 0, "mps"),
    ],
)
def test_gpus_are_dealt_out_among_workers(device: str, position: int, devices: int, expected: str) -> None:
    assert device_of_worker(device, position, devices) == expected


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    settings = {"name": "played", "output_dir": tmp_path, "model": {"path": "bundled"}, "data": {"path": "data"}}
    return check_config(settings)


def stages_started(folder: Path) -> list[str]:
    events = read_events(folder / "events.jsonl")
    return [event["stage"] for event in events if event["kind"] == "stage_started" and event["stage"] != "workflow"]


@pytest.mark.parametrize("stages", [CACHE, TRAIN])
def test_other_ranks_only_help_with_caching_and_leave_the_run_folder_to_the_first(
    run: RunConfig, play: Play, monkeypatch: pytest.MonkeyPatch, stages: tuple[str, ...]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (run.run_dir / "workers").mkdir(parents=True)
    player = play({})
    Path(player).with_name("scenario.json").rename(run.run_dir / "workers" / "scenario.json")
    with held_folder(run.run_dir):  # as the first rank does
        folder = run_workflow(run, stages, python=player)
    assert folder == run.run_dir / "workers" / "rank-1"
    assert stages_started(folder) == ["cache_latents", "cache_text"]
    assert not (run.run_dir / "events.jsonl").exists()


def test_the_first_rank_does_everything(run: RunConfig, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_workflow(run, TRAIN, python=play({})) == run.run_dir
    assert stages_started(run.run_dir) == list(TRAIN)


@pytest.mark.parametrize(
    ("environment", "configured", "processes"),
    [
        ({}, 1, 1),
        ({}, 2, 2),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 1, 4),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 8, 8),
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 2, 2),  # two machines
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 1, 1),
    ],
)
def test_training_takes_over_the_launchers_number(environment: dict[str, str], configured: int, processes: int) -> None:
    assert processes_to_train(environment, configured) == processes


def test_the_workflow_hands_the_number_to_the_training_stage(
    run: RunConfig, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    folder = run_workflow(run, TRAIN, python=play({}))
    assert load_config(folder / "config.yaml").train.processes == 3


def test_only_caching_stages_know_that_a_launcher_started_several(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "host", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert launched.items() <= process.environment_of("cache_text").items()
    alone = process.environment_of("train")
    assert not launched.keys() & alone.keys() and alone["PATH"]
