"""Which process a number means: numbers are used again, so each is kept together with the moment of its birth."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_STARTED = 19  # of the fields behind the name in /proc/PID/stat: clock ticks from the boot to the process's start


def birth_of(pid: int) -> str:
    """When the process was born, in a form that no other process of this number ever has; empty where there is none.

    On Linux the machine's boot and the ticks since then, which no change of the clock touches.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return f"{_BOOT.read_text().strip()}:{fields[_STARTED]}"
    except (OSError, IndexError):
        pass
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return ""


def is_alive(pid: int, birth: str) -> bool:
    """Whether the very process that had this number at that birth is still there, and not only its remains."""
    if pid <= 0 or not birth or birth_of(pid) != birth:
        return False
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def group_members(group: int) -> list[int]:
    """The living processes of a process group, its leader included."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


def with_descendants(pids: Iterable[int]) -> set[int]:
    """These processes, what they have started, what that has started, and the process groups that they lead."""
    found: set[int] = set()
    for pid in pids:
        found.update(group_members(pid))
        try:
            found.update(child.pid for child in psutil.Process(pid).children(recursive=True))
        except psutil.Error:
            continue
        found.add(pid)
    return found
