"""Stage `exact_lora`: a LoRA with isolated references, learnt from the bundled transformer itself.

What `train.self_distillation: 1` does, by the fast forward pass: the target is the velocity of the finished transformer
with full visibility, for the same noise and noise level. LoRA factors are multiplied out once a step instead of being
applied token by token.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dittocache.demo.model import load_pipeline
from dittocache.demo.train.dataset import Dataset
from dittocache.demo.train.dit import EMPTY_SHARE, agree, average_gradients, draw_sigmas
from dittocache.demo.train.encode import TEXT_LENGTH
from dittocache.demo.train.fast import TrainingForward
from dittocache.demo.train.muon import Muon
from dittocache.demo.train.run import Budget, Log, load_checkpoint, save_checkpoint
from dittocache.families.registry import get_family
from dittocache.training.config import TrainConfig
from dittocache.training.lora import WEIGHT_NAME, add_lora, save_lora, target_pattern

FAMILY = "qwen-image-edit-plus"
RANK = 32
BATCH = 16  # samples a process and step
RATE = 1e-3
EMA_DECAY = 0.99
HOLD = 0.4  # share of the budget before the learning rate falls
SAVE_STEPS = 50
CHECK_STEPS = 250


@dataclass
class Factors:
    """LoRA of one linear layer: `down` (rank, in) and `up` (out, rank) beside the frozen `base` (out, in)."""

    layer: nn.Linear
    base: torch.Tensor
    down: nn.Parameter
    up: nn.Parameter

    def merge(self) -> None:
        """Give the layer the weight that it has with its LoRA, gradients flowing to the factors."""
        self.layer.weight = self.base + self.up @ self.down


def add_factors(transformer: nn.Module, rank: int) -> dict[str, Factors]:
    """Freeze `transformer` and put LoRA factors in place of the weights of the family's target layers."""
    transformer.requires_grad_(False)
    pattern = target_pattern(get_family(FAMILY).lora_targets)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, layer in transformer.named_modules():
        if not isinstance(layer, nn.Linear) or re.fullmatch(pattern, name) is None:
            continue
        base = layer.weight.detach()
        down = (2 * torch.rand(rank, layer.in_features, generator=generator) - 1) * layer.in_features**-0.5
        up = torch.zeros(layer.out_features, rank)
        del layer._parameters["weight"]  # what stands here from now on is computed
        found[name] = Factors(layer, base, nn.Parameter(down), nn.Parameter(up))
        found[name].merge()
    return found


def read_factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors `(down, up)` by layer of a LoRA of this family."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHT_NAME)
    down, up = (f".lora_{letter}.weight" for letter in "AB")
    names = [name.removeprefix("transformer.").removesuffix(down) for name in tensors if name.endswith(down)]
    return {name: (tensors[f"transformer.{name}{down}"], tensors[f"transformer.{name}{up}"]) for name in names}


def save_factors(folder: Path, model_dir: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """Write factors `(down, up)` by layer as a LoRA in 16 bit that says what it was trained with; return the file."""
    family = get_family(FAMILY)
    transformer = load_pipeline(folder=model_dir).transformer
    rank = next(iter(factors.values()))[0].shape[0]
    settings = {"rank": rank, "reference_visibility": "isolated", "self_distillation": 1.0}
    config = TrainConfig.model_validate(settings)
    add_lora(transformer, family, config)
    modules: dict[str, Any] = dict(transformer.named_modules())
    for name, (down, up) in factors.items():
        modules[name].lora_A["default"].weight.data = down.detach().half()
        modules[name].lora_B["default"].weight.data = up.detach().half()
    return save_lora(transformer, family, folder, settings)


def distillation_loss(
    pupil: TrainingForward, teacher: TrainingForward, batch: dict[str, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error between the two velocities of a batch, the edited tokens weighted more."""
    sigmas = draw_sigmas(len(batch["target"]), generator)
    level = sigmas[:, None, None]
    noisy = (1 - level) * batch["target"] + level * torch.randn(batch["target"].shape, generator=generator)
    zero_cond = torch.ones(len(sigmas), dtype=torch.bool)
    inputs = (noisy, batch["source"], sigmas, batch["embeds"], batch["mask"], zero_cond)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            target = teacher(*inputs)
        errors = (pupil(*inputs) - target).square().mean(dim=-1)  # (B, 64)
    weights = batch["weights"]
    return (errors * weights).sum() / weights.sum()


@torch.no_grad()
def heldout_loss(pupil: TrainingForward, teacher: TrainingForward, heldout: Dataset) -> float:
    """Loss on the held-out edits at fixed noise and noise levels."""
    generator = torch.Generator().manual_seed(0)
    batches = heldout.in_order(BATCH, generator)
    losses = [float(distillation_loss(pupil, teacher, batch, generator)) for batch in batches]
    return sum(losses) / len(losses)


def train_exact_lora(
    work_dir: Path,
    model_dir: Path,
    minutes: float,
    compiled: bool = True,
    start: Path | None = None,
    rank: int = 0,
) -> Iterator[int]:
    """Train for `minutes` in all, yielding after every step; resumes from its checkpoint.

    Run it in processes that have joined one gloo group, one for each `rank`, or alone. The averaged LoRA is written to
    `work_dir/exact-lora` every `SAVE_STEPS` steps and at the end.

    Args:
        compiled: whether blocks are compiled, which takes minutes and pays in a long run.
        start: a LoRA with isolated references to begin with, of this rank or of a lower one.
    """
    transformer = load_pipeline(folder=model_dir).transformer
    teacher = TrainingForward(transformer.requires_grad_(False), TEXT_LENGTH, compiled)
    student = copy.deepcopy(transformer)
    factors = add_factors(student, RANK)
    for name, (down, up) in ({} if start is None else read_factors(start)).items():
        factors[name].down.data[: len(down)] = down
        factors[name].up.data[:, : len(down)] = up
    pupil = TrainingForward(student, TEXT_LENGTH, compiled, isolated=True)
    parameters = [one for part in factors.values() for one in (part.down, part.up)]
    average = [one.detach().clone() for one in parameters]
    muon = Muon(parameters, weight_decay=0.0)
    step, spent = 0, 0.0
    checkpoint = load_checkpoint(work_dir / "exact-lora.pt")
    if checkpoint is not None:
        for one, value in zip(parameters, checkpoint["factors"], strict=True):
            one.data.copy_(value)
        average, step, spent = checkpoint["average"], checkpoint["step"], checkpoint["spent"]
        muon.load_state_dict(checkpoint["muon"])
    data, heldout = Dataset.load(work_dir), Dataset.load_heldout(work_dir)
    log = Log(work_dir / "log.jsonl", "exact_lora")
    generator = torch.Generator().manual_seed(1000 * rank + step)
    order = data.batches(BATCH, seed=17 * rank + step)
    budget, recent = Budget(minutes, spent), []

    def save() -> None:
        state = {"factors": [one.detach() for one in parameters], "average": average, "muon": muon.state_dict()}
        save_checkpoint(work_dir / "exact-lora.pt", state | {"step": step, "spent": budget.spent})
        pairs = zip(average[::2], average[1::2], strict=True)
        save_factors(work_dir / "exact-lora", model_dir, dict(zip(factors, pairs, strict=True)))

    while (rate := agree(budget, HOLD)[1]) > 0 or step == 0:
        for part in factors.values():
            part.merge()
        loss = distillation_loss(pupil, teacher, data.batch(next(order), EMPTY_SHARE, generator), generator)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(parameters)  # zero where nothing reads what a factor makes: the last block's text
        muon.step(RATE * rate)
        for one in parameters:
            one.grad = None
        step += 1
        if rank != 0:
            yield step
            continue
        recent.append(float(loss.detach()))
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [one.detach() for one in parameters], 1 - decay)
        if step % SAVE_STEPS == 0:
            log.write(step=step, loss=round(sum(recent) / len(recent), 5), rate=round(rate, 3))
            recent = []
            save()
        if step % CHECK_STEPS == 0:
            for part in factors.values():
                part.merge()
            log.write(step=step, heldout_loss=round(heldout_loss(pupil, teacher, heldout), 5))
        yield step
    if rank == 0:
        save()
