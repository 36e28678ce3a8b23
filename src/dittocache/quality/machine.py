"""The machine that numbers were measured on: without it a number of seconds says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from dittocache.quality.report_data import Machine

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def describe_machine(packages: Sequence[str] = PACKAGES, cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """The CPU, usable cores, memory, accelerators, system and versions of this process.

    Args:
        packages: distributions whose versions are named after Python's; those not installed are left out.
        cpuinfo: Linux's description of the CPU; elsewhere `platform` is asked.
    """
    return Machine(
        cpu=cpu_model(cpuinfo),
        cores=usable_cores(),
        memory_bytes=memory_bytes(),
        system=f"{platform.system()} {platform.machine()}",
        accelerators=accelerators(),
        versions=versions(packages),
    )


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name, or its architecture where the system does not tell."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model") and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown CPU"


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine's in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory in bytes; None where the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def accelerators() -> tuple[str, ...]:
    """Names of the CUDA devices that torch sees, with their memory."""
    import torch

    if not torch.cuda.is_available():
        return ()
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple(f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices)


def versions(packages: Sequence[str] = PACKAGES) -> tuple[tuple[str, str], ...]:
    """(name, version) of Python and of those packages that are installed."""
    found = [("python", platform.python_version())]
    for package in packages:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)
