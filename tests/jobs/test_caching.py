"""The caching stages with several workers: everything is stored, failures are told, nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.jobs.conftest import draw_set

from dittocache.config import RunConfig, check_config, save_config
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.store import roots
from dittocache.embeddings.store.store import Store
from dittocache.errors import ConfigError
from dittocache.events import EventLog, read_events
from dittocache.jobs import worker_processes
from dittocache.jobs.cache_removal import remove_cache
from dittocache.jobs.caching import cache_latents, cache_text, encode_beside, settings_for_ray
from dittocache.jobs.inputs import RunInputs, load_manifest
from dittocache.jobs.lora_training import live_source
from dittocache.jobs.worker_processes import WorkerProcesses

Play = Callable[[dict[str, Any]], str]
RECORDS = 25  # four samples: two latents and four prompt embeddings each, one plain fact that all share


def cached(config: RunConfig) -> RunInputs:
    """Run both caching stages in this process, as the stage processes would."""
    inputs = RunInputs(config, config.run_dir)
    for name, stage in (("cache_latents", cache_latents), ("cache_text", cache_text)):
        stage(RunInputs(config, config.run_dir), EventLog(config.run_dir / "events.jsonl", name))
    return inputs


def events_of(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(config.run_dir / "events.jsonl") if event["kind"] == kind]


def records(config: RunConfig) -> dict[str, int]:
    """Each stored record and when it was written."""
    assert isinstance(config.cache.cache_dir, Path)
    return {path.stem: path.stat().st_mtime_ns for path in config.cache.cache_dir.glob("objects/*/*.safetensors")}


def test_a_run_caches_everything_registers_its_records_and_leaves_no_lease(config: RunConfig) -> None:
    inputs = cached(config)
    manifest = load_manifest(inputs)
    assert len(manifest.samples) == 4
    assert records(config).keys() == set(manifest.keys) and len(records(config)) == RECORDS
    [root] = roots.roots(inputs.store)
    assert root.saved and len(root) == RECORDS
    assert list((inputs.store.root / "leases").iterdir()) == []
    assert sum(event["encoded"] for event in events_of(config, "result")) == RECORDS


def test_records_that_were_collected_between_plan_and_registration_are_made_again(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = cached(config)
    lost = sorted(load_manifest(inputs).keys)[0]
    register = roots.register

    def collected_just_before(*arguments: Any, **settings: Any) -> Any:
        (inputs.store.root / "objects" / lost[:2] / f"{lost}.safetensors").unlink(missing_ok=True)
        monkeypatch.setattr(roots, "register", register)
        return register(*arguments, **settings)

    monkeypatch.setattr(roots, "register", collected_just_before)
    cached(config)
    assert lost in records(config)


def test_everything_is_encoded_again_and_replaced_where_existing_is_not_skipped(config: RunConfig) -> None:
    cached(config)
    before = records(config)
    again = check_config(config.model_dump(), {"cache.skip_existing": False})
    cached(again)
    after = records(config)
    assert after.keys() == before.keys()
    assert all(after[key] > before[key] for key in before)
    cached(again)  # not only the first time
    assert all(records(config)[key] > after[key] for key in after)


def test_encoding_again_in_a_group_of_ranks_is_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"skip_existing is false in a group of 2 processes.*cache\.workers"):
        cached(check_config(config.model_dump(), {"cache.skip_existing": False}))


def test_two_real_processes_share_the_work(config: RunConfig) -> None:
    config = check_config(config.model_dump(), {"cache.workers": 2, "data.path": draw_set(config.data.path, 8)})
    inputs = RunInputs(config, config.run_dir)
    cache_latents(inputs, EventLog(config.run_dir / "events.jsonl", "cache_latents"))
    assert not RunInputs(config, config.run_dir).plan().missing("vae")
    [result] = events_of(config, "result")
    assert result["encoded"] == len(records(config)) == 17
    beside = list(read_events(config.run_dir / "workers" / "1" / "events.jsonl"))
    assert beside[0]["kind"] == "stage_started" and "--worker" in beside[0]["command"]


def test_a_worker_that_fails_is_named_with_its_reason_and_the_work_is_done(
    config: RunConfig, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check_config(config.model_dump(), {"cache.workers": 3})
    (config.run_dir / "workers").mkdir(parents=True)
    failed = {"error": "CUDA out of memory", "hint": "", "returncode": 1}
    player = play({"cache_latents": {"failed": failed, "code": 1}})
    Path(player).with_name("scenario.json").rename(config.run_dir / "workers" / "scenario.json")
    monkeypatch.setattr(sys, "executable", player)
    inputs = RunInputs(config, config.run_dir)
    cache_latents(inputs, EventLog(config.run_dir / "events.jsonl", "cache_latents"))
    told = [event["text"] for event in events_of(config, "message") if event["level"] == "warning"]
    assert told == [
        f"worker {number} failed (return code 1): CUDA out of memory; others did its work" for number in (1, 2)
    ]
    assert not inputs.plan().missing("vae")


def test_a_worker_that_cannot_be_started_is_no_error(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = check_config(config.model_dump(), {"cache.workers": 2})
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    cache_latents(RunInputs(config, config.run_dir), EventLog(config.run_dir / "events.jsonl", "cache_latents"))
    assert "worker 1 cannot start (No such file or directory)" in [e["text"] for e in events_of(config, "message")]
    assert not RunInputs(config, config.run_dir).plan().missing("vae")


def test_a_cache_that_is_not_kept_loses_what_no_other_run_uses(config: RunConfig, tmp_path: Path) -> None:
    # Another run shares half of the samples, and cached one of them before this run did.
    other_set = draw_set(tmp_path / "other", 2)
    for number in range(2):
        for name in (f"training_images/edit-{number}.png", f"control_images/edit-{number}.png"):
            (other_set / name).write_bytes((config.data.path / name).read_bytes())
    other = check_config(config.model_dump(), {"name": "other", "data.path": other_set})
    cached(other)
    shared = set(records(other))
    passing = check_config(config.model_dump(), {"cache.keep_cache": False})
    inputs = cached(passing)
    assert len(records(config)) == RECORDS
    log = EventLog(config.run_dir / "events.jsonl", "remove_cache")
    remove_cache(inputs, log)
    assert set(records(config)) == shared
    assert [root.manifest for root in roots.roots(inputs.store)] == [(other.run_dir / "manifest.json").absolute()]
    remove_cache(inputs, log)
    assert "nothing to remove" in events_of(config, "message")[-1]["text"]


def test_a_cache_that_is_kept_is_not_noted_for_removal(config: RunConfig) -> None:
    remove_cache(cached(config), EventLog(config.run_dir / "events.jsonl", "remove_cache"))
    assert len(records(config)) == RECORDS


def test_latents_can_be_kept_and_prompts_removed(config: RunConfig) -> None:
    passing = check_config(config.model_dump(), {"cache.text_keep_cache": False})
    remove_cache(cached(passing), EventLog(config.run_dir / "events.jsonl", "remove_cache"))
    manifest = Manifest.load(config.run_dir / "manifest.json")
    latents = {key for keys in manifest.samples.values() for name, key in keys.items() if "prompt" not in name}
    assert records(config).keys() == latents


def test_latents_can_be_encoded_again_and_prompts_left_alone(config: RunConfig) -> None:
    cached(config)
    before = records(config)
    cached(check_config(config.model_dump(), {"cache.latent_skip_existing": False}))
    changed = {key for key, written in records(config).items() if written != before[key]}
    manifest = Manifest.load(config.run_dir / "manifest.json")
    assert changed == {key for keys in manifest.samples.values() for name, key in keys.items() if "prompt" not in name}


def test_text_encoders_in_8_bits_make_embeddings_of_their_own_keys_close_to_the_others(config: RunConfig) -> None:
    manifests = []
    for fp8 in (False, True):
        inputs = cached(check_config(config.model_dump(), {"cache.text_encoder_fp8": fp8}))
        manifests.append(load_manifest(inputs))
    plain, rounded = (manifest.samples["edit-0"] for manifest in manifests)
    assert plain["image_latents"] == rounded["image_latents"]
    assert plain["prompt_embeds"] != rounded["prompt_embeds"]
    first, second = (inputs.store.read(keys["prompt_embeds"]).float() for keys in (plain, rounded))
    error = ((first - second).norm() / first.norm()).item()
    assert 0 < error < 0.2
    # Live training encodes with the same weights: what is in the cache is what it would compute.
    [live] = live_source(inputs).load(["edit-0"])
    assert torch.equal(live["prompt_embeds"].float(), second)


def test_settings_for_ray_stand_on_their_own(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.data.path.parent)
    relative = {"data.path": "data", "cache.cache_dir": "store", "cache.devices": {"vae": "cuda:3"}}
    found = settings_for_ray(RunInputs(check_config(config.model_dump(), relative), config.run_dir))
    assert found["data"]["path"] == str(config.data.path)
    assert found["cache"]["cache_dir"] == str(config.data.path.parent / "store")
    assert found["cache"]["devices"] == {"vae": "cuda"}  # Ray shows an actor its own GPU only
    assert found["model"]["device"] == "cpu"


def test_what_a_ray_actor_does_encodes_and_leaves_the_run_folder_alone(config: RunConfig) -> None:
    settings = settings_for_ray(RunInputs(config, config.run_dir))
    found = encode_beside("cache_latents", settings, str(config.run_dir), 2)
    assert (found["encoded"], found["failed"]) == (9, {})
    assert [path.name for path in config.run_dir.iterdir()] == ["workers"]


def test_two_ranks_of_torchrun_cache_one_set_together(config: RunConfig) -> None:
    cache_latents(RunInputs(config, config.run_dir), EventLog(config.run_dir / "events.jsonl", "cache_latents"))
    folders = [config.run_dir, config.run_dir / "workers" / "rank-1"]
    ranks = []
    for rank, folder in enumerate(folders):
        save_config(config, folder / "config.yaml")
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dittocache.jobs.stage", "cache_text", "--run-dir", str(folder)]
        ranks.append(subprocess.Popen(command, env={**os.environ, **group}))
    assert [process.wait(100) for process in ranks] == [0, 0]
    assert isinstance(config.cache.cache_dir, Path)
    manifest = load_manifest(RunInputs(config, config.run_dir))
    assert len(manifest.samples) == 4
    assert len(Store(config.cache.cache_dir).sizes(manifest.keys)) == RECORDS
    assert not (folders[1] / "manifest.json").exists()
    events = [event for folder in folders for event in read_events(folder / "events.jsonl")]
    encoded = [event["encoded"] for event in events if event["kind"] == "result" and event["stage"] == "cache_text"]
    assert len(encoded) == 2 and sum(encoded) == 16, "a record was encoded twice, or not counted"


def test_workers_are_not_left_behind(config: RunConfig, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    (config.run_dir / "workers").mkdir(parents=True)
    player = play({"cache_latents": {"seconds": 60, "deaf": True}})
    Path(player).with_name("scenario.json").rename(config.run_dir / "workers" / "scenario.json")
    monkeypatch.setattr(sys, "executable", player)
    monkeypatch.setattr(worker_processes, "_SECONDS_TO_END", 0.1)
    log = EventLog(config.run_dir / "events.jsonl", "cache_latents")
    with pytest.raises(KeyboardInterrupt), WorkerProcesses("cache_latents", config, config.run_dir, 2, log) as workers:
        raise KeyboardInterrupt
    assert all(worker.process.returncode == -9 for worker in workers._workers)


@pytest.mark.enable_socket
@pytest.mark.timeout(300)
def test_ray_actors_cache_a_set_and_the_stage_counts_what_they_did(config: RunConfig) -> None:
    ray = pytest.importorskip("ray")
    path = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": path})
    config = check_config(config.model_dump(), {"cache.workers": 2, "cache.runner": "ray"})
    try:
        cached(config)
    finally:
        ray.shutdown()
    assert len(records(config)) == RECORDS
    assert sum(event["encoded"] for event in events_of(config, "result")) == RECORDS
    assert not [event for event in events_of(config, "message") if event["level"] == "warning"]
    assert not [event for event in events_of(config, "message") if "loading" in event["text"]]  # the actors did
