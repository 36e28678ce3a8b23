"""The generating stage's pipeline: weighed before it is loaded, whole on a CPU, in parts on a small GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.config import check_config
from dittocache.demo.tiny import save_tiny, tiny_pipeline
from dittocache.events import EventLog, read_events
from dittocache.jobs import placed_pipeline
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.placed_pipeline import load_placed, weights_bytes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "flux", "flux")


def inputs_of(checkpoint: Path, folder: Path, offload: str = "auto", device: str = "cpu") -> RunInputs:
    settings = {
        "model": {"path": str(checkpoint), "dtype": "bfloat16", "device": device},
        "data": {"path": str(folder)},
        "generate": {"offload": offload},
        "output_dir": str(folder),
    }
    config = check_config(settings)
    return RunInputs(config, config.run_dir)


def test_weights_are_counted_without_loading_them(checkpoint: Path, tmp_path: Path) -> None:
    found = weights_bytes(inputs_of(checkpoint, tmp_path), ["transformer", "text_encoder", "vae"])
    pipe = tiny_pipeline("flux")
    for name, count in found.items():
        assert count == 2 * sum(one.numel() for one in getattr(pipe, name).state_dict().values()), name


def test_on_a_cpu_an_offload_is_said_to_do_nothing(checkpoint: Path, tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "generate")
    pipe = load_placed(inputs_of(checkpoint, tmp_path, "layers"), log)
    assert pipe.transformer.device.type == "cpu"
    assert "generate.offload layers does nothing on cpu" in str(list(read_events(tmp_path / "events.jsonl")))


def test_a_model_larger_than_the_gpu_is_brought_in_parts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(placed_pipeline, "place", lambda *arguments: placed.append(arguments))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    inputs = inputs_of(checkpoint, tmp_path, device="cuda")
    object.__setattr__(inputs, "device", "cuda")
    load_placed(inputs, EventLog(tmp_path / "events.jsonl", "generate"))
    [(pipe, device, offload)] = placed
    assert (device, offload) == ("cuda", "layers")
    assert pipe.transformer.device.type == "cpu"
