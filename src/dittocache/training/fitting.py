"""Which way of holding the frozen weights fits into the memory that is there: a function of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dittocache.training.memory_plan import RESERVED, MemoryPlan, gigabytes

Choice = Mapping[str, Any]

# From the fastest to the slowest. Recomputing costs a third of a step; fp8 a cast of each weight and some accuracy;
# bringing every block over the bus twice a step costs least beside the long steps of large pictures.
CHOICES: tuple[Choice, ...] = tuple(
    MappingProxyType(choice)
    for choice in (
        {"gradient_checkpointing": False, "base_quantization": "none", "offload": "none"},
        {"gradient_checkpointing": True, "base_quantization": "none", "offload": "none"},
        {"gradient_checkpointing": True, "base_quantization": "fp8", "offload": "none"},
        {"gradient_checkpointing": True, "base_quantization": "none", "offload": "group"},
        {"gradient_checkpointing": True, "base_quantization": "fp8", "offload": "group"},
    )
)
"""Settings of `train` that need no further package."""


@dataclass(frozen=True)
class Fit:
    """A choice, its plan, and why, in one line for the user; `fits` is False where none of the choices does."""

    choice: Choice
    plan: MemoryPlan
    reason: str
    fits: bool = True


def fitting_choice(device_bytes: int, machine_bytes: int, plans: Sequence[tuple[Choice, MemoryPlan]]) -> Fit:
    """The first choice whose plan leaves `RESERVED` free on the device, and whose offloaded weights fit the machine.

    Args:
        device_bytes: free on the GPU.
        machine_bytes: free in the machine's memory.
        plans: choices from the most to the least wanted, each with its plan; at least one.

    Where none fits, the one that needs the least of the device, with a reason that says so.
    """
    for choice, plan in plans:
        machine = plan.weights if plan.offloaded else 0
        if plan.device_total + RESERVED <= device_bytes and machine <= machine_bytes:
            words = (
                f"{gigabytes(device_bytes)} are free on the GPU, training takes about {gigabytes(plan.device_total)}"
            )
            return Fit(choice, plan, f"{words}: {_described(choice)}")
    choice, plan = min(plans, key=lambda pair: pair[1].device_total)
    words = f"{gigabytes(device_bytes)} are free on the GPU and {gigabytes(machine_bytes)} in the machine's memory"
    need = f"training needs at least about {gigabytes(plan.device_total + RESERVED)} of the GPU"
    if plan.offloaded:
        need += f" and {gigabytes(plan.weights)} of the machine"
    return Fit(choice, plan, f"{words}; {need}: a lower data.resolution takes less", fits=False)


def _described(choice: Choice) -> str:
    words = [name.replace("_", " ") for name in ("gradient_checkpointing",) if choice[name]]
    words += [f"weights in {choice['base_quantization']}"] if choice["base_quantization"] != "none" else []
    words += ["blocks brought from the machine's memory"] if choice["offload"] != "none" else []
    return ", ".join(words) or "nothing has to be saved"
