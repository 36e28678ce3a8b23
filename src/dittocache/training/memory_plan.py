"""What a training will hold in memory, computed before anything is loaded.

Weights, LoRA, gradients and optimizer are exact (`transformer_facts`). Activations are what one forward pass saves for
the backward pass; the working space is a bound on what one operation of the backward pass has open besides. What CUDA,
its libraries and the allocator's gaps take is not in the sum: leave `RESERVED` free for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittocache.families.base import Family
from dittocache.training.config import TrainConfig
from dittocache.training.transformer_facts import TEXT_TOKENS as TEXT_TOKENS
from dittocache.training.transformer_facts import BatchSize as BatchSize
from dittocache.training.transformer_facts import TransformerFacts, transformer_facts
from dittocache.training.transformer_facts import safetensors_sizes as safetensors_sizes

NF4 = 0.5 + 4 / 64  # bytes a weight: 4 bit, and one float32 scale for 64 weights
OPEN_AT_ONCE = 4  # largest tensors of one operation's backward pass: gradients in and out, and a float32 copy of each
BLOCKS_ON_DEVICE = (
    2  # of an offloaded transformer: the one at work, whose weights its backward pass keeps, and the next
)
RESERVED = 1_500_000_000
"""Bytes of a GPU that the plan does not count: CUDA's context, its libraries' workspaces, gaps between tensors."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training holds on the device.

    Attributes:
        weights: frozen weights, as they are held.
        lora: its parameters.
        gradients: of them.
        optimizer: its moments.
        average: the moving average of the LoRA.
        activations: kept for the backward pass, an estimate.
        working: open while one operation is computed, a bound: gradients, and weights in the computing format.
        offloaded: True where the weights stay in the machine's memory.
        notes: what the reader should know.
    """

    weights: int
    lora: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    working: int = 0
    offloaded: bool = False
    notes: tuple[str, ...] = ()

    @property
    def device_total(self) -> int:
        """All that the device holds."""
        held = self.lora + self.gradients + self.optimizer + self.average + self.activations + self.working
        return held if self.offloaded else held + self.weights

    def describe(self) -> str:
        """One line for the user."""
        where = " (in the machine's memory)" if self.offloaded else ""
        parts = [f"weights {gigabytes(self.weights)}{where}", f"LoRA {gigabytes(self.lora)}"]
        parts += [f"gradients {gigabytes(self.gradients)}", f"optimizer {gigabytes(self.optimizer)}"]
        parts += [f"average {gigabytes(self.average)}"] if self.average else []
        parts += [f"activations about {gigabytes(self.activations)}", f"working space {gigabytes(self.working)}"]
        return "; ".join([f"memory for training about {gigabytes(self.device_total)}: {', '.join(parts)}", *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """For events."""
        names = ("weights", "lora", "gradients", "optimizer", "average", "activations", "working", "device_total")
        return {name: getattr(self, name) for name in names} | {"notes": list(self.notes)}


def plan_memory(folder: Path, family: Family, config: TrainConfig, dtype: torch.dtype, size: BatchSize) -> MemoryPlan:
    """The plan for training on the checkpoint in `folder` with samples of `size`.

    Raises ModelError where the checkpoint has no transformer's config or its weights are incomplete.
    """
    return plan_of(transformer_facts(folder, family, config, dtype, size), config)


def plan_of(facts: TransformerFacts, config: TrainConfig) -> MemoryPlan:
    """The plan for these counts, with the weights held as `config` says: a function of numbers.

    Of `config` only what the counts leave open matters: base_quantization, offload, gradient_checkpointing, ema_decay.
    """
    one_block = facts.kept // facts.blocks  # while it is computed again
    return MemoryPlan(
        weights=_held(facts, config),
        lora=facts.lora,
        gradients=facts.lora,
        optimizer=facts.optimizer,
        average=facts.lora if config.ema_decay is not None else 0,
        activations=facts.between + one_block if config.gradient_checkpointing else facts.kept,
        working=OPEN_AT_ONCE * facts.largest + _in_computing_format(facts, config),
        offloaded=config.offload == "group",
        notes=facts.notes,
    )


def gigabytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _held(facts: TransformerFacts, config: TrainConfig) -> int:
    """Bytes of the frozen weights as they are held."""
    if config.base_quantization == "fp8":
        return facts.weights_in_fp8
    a_weight = {"none": float(facts.element), "nf4": NF4, "int8": 1.0}[config.base_quantization]
    return int(facts.weights - facts.linear * (1 - a_weight / facts.element))


def _in_computing_format(facts: TransformerFacts, config: TrainConfig) -> int:
    """Bytes of weights on the device beside those that are held there: brought there, or made from smaller ones."""
    one_block = facts.weights // facts.blocks
    if config.offload == "group":
        return BLOCKS_ON_DEVICE * one_block
    if config.base_quantization == "none":
        return 0
    if config.base_quantization == "fp8" and not config.gradient_checkpointing:
        return facts.weights  # cast for the forward pass, and kept by it (`load_frozen` warns)
    return one_block
