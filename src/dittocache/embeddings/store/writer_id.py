"""Who writes a temporary file, so that another process can tell whether the writer is still alive."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

from blake3 import blake3


def current() -> str:
    """Machine and process as one word without dots: `MACHINE-PID`."""
    return f"{_machine()}-{os.getpid()}"


def is_dead(writer: str) -> bool:
    """Whether this writer ran on this machine and is gone; of other machines nothing can be told."""
    machine, _, process = writer.partition("-")
    if machine != _machine() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False  # alive, under another user
    return False


@cache
def _machine() -> str:
    """Host, boot and PID namespace: containers that share a host name do not see each other's processes."""
    words = [platform.node()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists():
        words.append(boot.read_text())
    if namespace.is_symlink():
        words.append(os.readlink(namespace))
    return str(blake3("\0".join(words).encode()).hexdigest(length=6))
