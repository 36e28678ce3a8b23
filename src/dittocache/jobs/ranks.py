"""Which of the processes that torchrun or Slurm started this one is, and which GPU is its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dittocache.errors import ConfigError

# By launcher: this process's number, how many there are, its number on this machine.
_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Rank:
    """One process of a group: `index` of `count`, and `local`, its number among those on this machine."""

    index: int = 0
    count: int = 1
    local: int = 0


def rank_of(environment: Mapping[str, str]) -> Rank:
    """The rank that torchrun, or else srun, gave this process; the only one where neither started it.

    Raises ConfigError when the variables make no sense.
    """
    for names in _LAUNCHERS:
        index, count, local = names
        if index not in environment or count not in environment:
            continue
        found = {name: environment.get(name, "0") for name in names}
        if not all(value.isdecimal() for value in found.values()) or int(found[index]) >= int(found[count]):
            listed = ", ".join(f"{name}={value!r}" for name, value in found.items())
            raise ConfigError(
                f"the environment says {listed}; expected numbers with {index} below {count}, as torchrun and srun set "
                "them; unset them to run one process"
            )
        return Rank(int(found[index]), int(found[count]), int(found[local]))
    return Rank()


def without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that works alone, though a launcher started its parent as one of several."""
    ours = {name for names in _LAUNCHERS for name in names}
    return {
        name: value
        for name, value in environment.items()
        if name not in ours | {"LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
        and not name.startswith("TORCHELASTIC_")
    }


def processes_to_train(environment: Mapping[str, str], configured: int) -> int:
    """How many processes train together, started by the first of those that a launcher started on this machine.

    As many as the launcher started, or `configured` where that is more, or where they are spread over machines or
    srun started them: then what starts them must also be told where they meet.
    """
    count, local = environment.get("WORLD_SIZE", "1"), environment.get("LOCAL_WORLD_SIZE", "")
    return max(configured, int(count)) if count == local else configured


def lost_processes(environment: Mapping[str, str]) -> str | None:
    """A warning where `accelerate launch --cpu` was asked for several processes, of which it starts one; else None."""
    asked = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and "MASTER_PORT" in environment
    if not asked or "WORLD_SIZE" in environment:
        return None
    return (
        "accelerate launch --cpu starts one process, whatever --num_processes says, so this one trains alone; set "
        "train.processes, or use accelerate launch --multi_gpu, which starts them on CPUs too"
    )


def device_of_worker(device: str, position: int, devices: int) -> str:
    """The device of the worker at `position` on this machine: CUDA devices are dealt out from the named one on.

    Args:
        devices: how many CUDA devices this process sees.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or devices < 2:
        return device
    return f"cuda:{(int(index or 0) + position) % devices}"
