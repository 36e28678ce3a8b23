"""A run that was interrupted and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import MemoryReader
from tests.training.processes import environment

from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import ConfigError, ModelError
from dittocache.families.base import Family
from dittocache.training.accelerator import make_accelerator
from dittocache.training.checkpoint import (
    RAW_NAME,
    Trained,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    saved_settings,
)
from dittocache.training.config import TrainConfig
from dittocache.training.continuation import check_continuation, run_settings
from dittocache.training.loop import TrainState, train_lora
from dittocache.training.lora import WEIGHT_NAME, add_lora
from dittocache.training.sources import CachedSource

SETTINGS: dict[str, Any] = {"steps": 5, "batch_size": 2, "rank": 2, "learning_rate": 5e-3, "warmup_steps": 2}


class Steps(torch.optim.Optimizer):
    """An optimizer with state of every kind: tensors, numbers, nothing, and numbers in its groups that it changes."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "estimate": 1.0, "taken": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["taken"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.setdefault("bytes", torch.zeros(parameter.shape, dtype=torch.uint8)).add_(1)
                state["norm"] = float(parameter.grad.norm()) + state.get("norm", 0.0)
                state["nothing"] = None
                group["estimate"] = 0.9 * group["estimate"] + 0.1 * state["norm"]
                parameter.sub_(
                    parameter.grad.sign(), alpha=group["lr"] * group["estimate"] * float(state["bytes"].max())
                )


def _run(
    family: Family, reader: MemoryReader, config: TrainConfig, accelerator: Any = None, **options: Any
) -> tuple[list[TrainState], dict[str, torch.Tensor]]:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    add_lora(transformer, family, config)
    run = train_lora(
        transformer, family, CachedSource(reader), reader.names, config, accelerator, caption_dropout=0.3, **options
    )
    states = list(run)
    weights = {name: one.detach() for name, one in transformer.named_parameters() if "lora_" in name}
    if states and states[-1].checkpoint is not None:
        weights |= {f"to use: {name}": one for name, one in load_file(states[-1].checkpoint / WEIGHT_NAME).items()}
    return states, weights


def _numbers(states: list[TrainState]) -> list[tuple[float, float, float]]:
    return [(state.loss, state.grad_norm, state.learning_rate) for state in states]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "ema_decay": 0.9, "lora_dropout": 0.4},
        {"optimizer": "torch.optim.SGD", "optimizer_args": {"momentum": 0.9}, "lr_schedule": "polynomial"},
        {"optimizer": f"{__name__}.Steps", "lr_schedule": "constant"},
        {"gradient_checkpointing": True, "mixed_precision": "bf16", "timestep_sampling": "resolution_shifted"},
    ],
    ids=["accumulation, average, dropout", "momentum", "state of every kind", "bf16"],
)
@pytest.mark.usefixtures("fresh_accelerate")
def test_interrupted_at_any_step(
    family: Family, reader: MemoryReader, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Steps.__module__])
    config = TrainConfig.model_validate({**SETTINGS, **settings})
    whole, expected = _run(family, reader, config, checkpoint_dir=tmp_path / "whole")
    for interrupted_after in (1, 3):
        folder = tmp_path / str(interrupted_after)
        asked = iter([False] * (interrupted_after - 1) + [True])
        options: dict[str, Any] = {"checkpoint_dir": folder, "resume": True}
        torch.manual_seed(interrupted_after)  # whatever else drew random numbers
        first, _ = _run(family, reader, config, should_stop=lambda asked=asked: next(asked), **options)  # type: ignore[misc]
        assert [state.stopped for state in first] == [False] * (interrupted_after - 1) + [True]
        rest, weights = _run(family, reader, config, **options)
        assert _numbers(first + rest) == _numbers(whole)
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_scaler_of_fp16_goes_on_where_it_was(family: Family, reader: MemoryReader, tmp_path: Path) -> None:
    config = TrainConfig.model_validate({**SETTINGS, "mixed_precision": "fp16"})

    def accelerator() -> Any:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        made = Accelerator(cpu=True, mixed_precision="fp16")
        # accelerate scales on GPUs alone; PyTorch's scaler itself works anywhere. Its first steps overflow.
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**23, growth_interval=2)
        made.native_amp = True
        return made

    whole, expected = _run(family, reader, config, accelerator())
    asked = iter([False, True])
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "resume": True}
    first, _ = _run(family, reader, config, accelerator(), should_stop=lambda: next(asked), **options)
    saved = json.loads((checkpoints(tmp_path)[-1] / "state.json").read_text())["scaler"]
    assert saved["scale"] < 2.0**23
    rest, weights = _run(family, reader, config, accelerator(), **options)
    norms = [state.grad_norm for state in whole]
    assert any(math.isfinite(norm) for norm in norms) and not all(math.isfinite(norm) for norm in norms)
    assert str(_numbers(first + rest)) == str(_numbers(whole))  # as text, for what is not a number equals nothing
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from tests.training.conftest import MemoryReader
from dittocache.demo.tiny import tiny_pipeline
from dittocache.families.registry import get_family
from dittocache.training.config import TrainConfig
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora
from dittocache.training.sources import CachedSource
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
config, family = TrainConfig.model_validate(settings), get_family("qwen-image-edit-plus")
reader = MemoryReader(torch.load(folder / "samples.pt", weights_only=True))
transformer = tiny_pipeline("qwen-image-edit-plus").transformer
add_lora(transformer, family, config)
for state in train_lora(transformer, family, CachedSource(reader), reader.names, config, caption_dropout=0.3,
                        checkpoint_dir=folder / "run"):
    if state.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("fresh_accelerate")
def test_killed_without_warning(family: Family, reader: MemoryReader, tmp_path: Path) -> None:
    settings = {**SETTINGS, "checkpoint_every": 3}
    torch.save(reader.tensors, tmp_path / "samples.pt")
    command = [sys.executable, "-c", KILLED, str(tmp_path), json.dumps(settings)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    [left] = checkpoints(tmp_path / "run")
    assert left.name == "step-00000003"
    config = TrainConfig.model_validate(settings)
    whole, expected = _run(family, reader, config)
    rest, weights = _run(family, reader, config, checkpoint_dir=tmp_path / "run", resume=True)
    assert _numbers(rest) == _numbers(whole)[3:]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_only_the_newest_checkpoints_are_kept(family: Family, reader: MemoryReader, tmp_path: Path) -> None:
    config = TrainConfig.model_validate({**SETTINGS, "checkpoint_every": 1, "keep_checkpoints": 2})
    _run(family, reader, config, checkpoint_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-00000004", "step-00000005"]


def test_a_save_that_is_cut_short_leaves_the_former_checkpoint(
    family: Family, reader: MemoryReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.model_validate({**SETTINGS, "checkpoint_every": 2})

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith("step-00000004"):
            raise OSError("power cut")
        os.rename(source, target)

    monkeypatch.setattr("dittocache.training.checkpoint.os.replace", replace)
    with pytest.raises(OSError, match="power cut"):
        _run(family, reader, config, checkpoint_dir=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]
    rest, _ = _run(family, reader, config, checkpoint_dir=tmp_path, resume=True)
    assert _numbers(rest) == _numbers(_run(family, reader, config)[0])[2:]


def test_the_average_is_what_loads_and_the_raw_weights_are_what_goes_on(
    family: Family, reader: MemoryReader, tmp_path: Path
) -> None:
    config = TrainConfig.model_validate({**SETTINGS, "ema_decay": 0.5})
    states, raw = _run(family, reader, config, checkpoint_dir=tmp_path)
    checkpoint = states[-1].checkpoint
    assert checkpoint is not None
    used = (checkpoint / WEIGHT_NAME).read_bytes()
    assert used != (checkpoint / RAW_NAME / WEIGHT_NAME).read_bytes()
    pipe = tiny_pipeline("qwen-image-edit-plus")
    pipe.load_lora_weights(checkpoint)
    loaded = {name: one for name, one in pipe.transformer.named_parameters() if "lora_B" in name}
    alike = {name for name, one in loaded.items() if torch.equal(one, raw[name.replace("default_0", "default")])}
    assert {name.split(".")[1] for name in alike} == {"1"}  # the last block's text stream has no gradient
    assert len(loaded) - len(alike) == 20


CONFIG = TrainConfig.model_validate(SETTINGS)


def _settings(config: TrainConfig, family: Family, **identity: str) -> dict[str, Any]:
    return run_settings(config, family, ["a", "b"], 0.1, 1, {"model": "m", "data": "d", **identity})


@pytest.mark.parametrize(
    ("change", "names"),
    [({"rank": 8}, ["alpha", "rank"]), ({"alpha": 7}, ["alpha"]), ({"ema_decay": 0.9}, ["averaged"])],
)
def test_what_changes_the_meaning_is_refused(family: Family, change: dict[str, Any], names: list[str]) -> None:
    other = CONFIG.model_copy(update=change)
    with pytest.raises(ConfigError) as caught:
        check_continuation(_settings(CONFIG, family), _settings(other, family), Path("step-00000001"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == names


def test_another_model_is_refused_and_other_data_are_told(family: Family) -> None:
    with pytest.raises(ConfigError, match=r"model: the transformer's weights .* has 'm', this run has 'n'"):
        check_continuation(_settings(CONFIG, family), _settings(CONFIG, family, model="n"), Path("c"))
    other = CONFIG.model_copy(update={"learning_rate": 1.0})
    told = check_continuation(_settings(CONFIG, family), _settings(other, family, data="e"), Path("c"))
    assert [line.split(":")[0] for line in told] == ["data", "learning_rate"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"checkpoint_every": 7, "keep_checkpoints": 1, "validate_every": 3, "gradient_checkpointing": True}, []),
        ({"batch_size": 1, "gradient_accumulation_steps": 2}, []),
        ({"batch_size": 1}, ["global_batch"]),
        ({"steps": 99}, ["steps"]),
    ],
)
def test_what_numbers_do_not_depend_on_may_change(family: Family, change: dict[str, Any], told: list[str]) -> None:
    other = CONFIG.model_copy(update=change)
    lines = check_continuation(_settings(CONFIG, family), _settings(other, family), Path("c"))
    assert [line.split(":")[0] for line in lines] == told


def test_a_longer_run_at_a_constant_rate_is_the_same_run(family: Family, reader: MemoryReader, tmp_path: Path) -> None:
    config = TrainConfig.model_validate({**SETTINGS, "lr_schedule": "constant", "steps": 6, "warmup_steps": 1})
    whole, _ = _run(family, reader, config)
    notices: list[str] = []
    first, _ = _run(family, reader, config.model_copy(update={"steps": 3}), checkpoint_dir=tmp_path)
    rest, _ = _run(family, reader, config, checkpoint_dir=tmp_path, resume=True, notice=notices.append)
    assert _numbers(first + rest) == _numbers(whole)
    assert notices == []


def test_going_on_with_another_rate_is_told_and_done(family: Family, reader: MemoryReader, tmp_path: Path) -> None:
    config = TrainConfig.model_validate({**SETTINGS, "weight_decay": 0.5})
    asked = iter([True])
    _run(family, reader, config, checkpoint_dir=tmp_path, should_stop=lambda: next(asked))
    assert saved_settings(checkpoints(tmp_path)[-1])["learning_rate"] == 5e-3
    notices: list[str] = []
    other = config.model_copy(update={"learning_rate": 1e-3})
    rest, _ = _run(family, reader, other, checkpoint_dir=tmp_path, resume=True, notice=notices.append)
    assert max(state.learning_rate for state in rest) == pytest.approx(1e-3)
    assert len(notices) == 1 and "learning_rate: the checkpoint has 0.005, this run has 0.001" in notices[0]


def test_a_state_that_cannot_be_saved_is_an_error_that_names_it(family: Family, tmp_path: Path) -> None:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    parameters = add_lora(transformer, family, CONFIG)
    optimizer = torch.optim.SGD(parameters)
    optimizer.state[parameters[0]]["callback"] = print
    with pytest.raises(ConfigError, match="optimizer/state/0/callback"):
        save_checkpoint(tmp_path, 1, Trained(transformer, family, optimizer), {})
    assert checkpoints(tmp_path) == []


def test_a_checkpoint_of_other_parameters_does_not_load(family: Family, tmp_path: Path) -> None:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    add_lora(transformer, family, CONFIG)
    saved = Trained(transformer, family, torch.optim.SGD(list(Trained(transformer, family, None).parameters.values())))  # type: ignore[arg-type]
    checkpoint = save_checkpoint(tmp_path, 1, saved, {})
    name, parameter = next(iter(saved.parameters.items()))
    parameter.requires_grad_(False)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_checkpoint(checkpoint, saved)


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        make_accelerator(TrainConfig(mixed_precision="fp16"), "cpu")


def test_loggers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dittocache.training.accelerator.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        make_accelerator(TrainConfig.model_validate({"log_with": ["tensorboard", "wandb"]}), "cpu")
    assert [problem.split(" is ")[0] for problem in caught.value.problems] == [
        "train.log_with: tensorboard",
        "train.log_with: wandb",
    ]
