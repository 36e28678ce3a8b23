"""Two processes on one machine (gloo) train as one process with twice the batch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import MemoryReader
from tests.training.distributed_worker import run_case
from tests.training.processes import run_distributed

WORKER = str(Path(__file__).with_name("distributed_worker.py"))
PORT = 20_000 + os.getpid() % 20_000

# Plain gradient descent at rate 1 for one step: the weights move by the gradient itself.
ONE_STEP: dict[str, Any] = {
    "steps": 1,
    "optimizer": "torch.optim.SGD",
    "learning_rate": 1.0,
    "max_grad_norm": 1e9,
    "rank": 2,
}
TWO_STEPS: dict[str, Any] = {"steps": 2, "learning_rate": 5e-3, "rank": 2, "ema_decay": 0.9}


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path, reader: MemoryReader) -> None:
    torch.save(reader.tensors, tmp_path / "samples.pt")
    cases = {
        "plain": {**ONE_STEP, "batch_size": 1},
        "accumulated": {**ONE_STEP, "batch_size": 1, "gradient_accumulation_steps": 2},
        "adamw": {**TWO_STEPS, "batch_size": 2},
        "spoilt": {**TWO_STEPS, "batch_size": 1, "gradient_accumulation_steps": 2, "bad": "s2"},
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    for code, output in run_distributed([WORKER, str(tmp_path)], 2, PORT):
        assert code == 0, output

    for name, settings in cases.items():
        if name == "spoilt":
            continue
        alone = {**settings, "batch_size": 2 * settings["batch_size"] * settings.get("gradient_accumulation_steps", 1)}
        run_case(tmp_path, "alone", {**alone, "gradient_accumulation_steps": 1})
        two, one = (json.loads((tmp_path / f"{which}.json").read_text()) for which in (name, "alone"))
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5), name
        assert two["norms"] == pytest.approx(one["norms"], rel=1e-4), name
        assert two["norms"][0] > 0.01
        weights = load_file(tmp_path / f"{name}.safetensors")
        for key, expected in load_file(tmp_path / "alone.safetensors").items():
            assert torch.allclose(weights[key], expected, rtol=1e-3, atol=1e-5), (name, key)
        for checkpoint in (tmp_path / "checkpoints-alone").iterdir():
            checkpoint.rename(tmp_path / f"{name}-{checkpoint.name}")

    # Both processes stop, and both name the sample that only one of them had.
    errors = [(tmp_path / f"spoilt-{rank}.txt").read_text() for rank in range(2)]
    assert all("not finite for s2" in error for error in errors)
