"""Stages as forks of one process that has loaded everything, in place of processes that load it again each time.

What a stage does stays the same, and so do its own session, descriptors, output and environment; only the seconds that
torch and diffusers take to load are saved. How real stage processes start and end is tested in `tests/jobs`.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from types import SimpleNamespace
from typing import IO, Any

import pytest

from dittocache.jobs import process, stage
from dittocache.jobs.stages import STAGES

COMMAND = [sys.executable, "-m", "dittocache.jobs.stage"]
DESCRIPTORS = ("--lifeline", "--after")


class ForkedStage:
    """The part of `subprocess.Popen` that `StageProcess` uses."""

    def __init__(
        self, command: Sequence[str], *, stdout: IO[bytes], env: Mapping[str, str], pass_fds: Sequence[int], **_: Any
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(sorted({stage.module for stage in STAGES.values()}))
        inherited = {number: DupFd(number) for number in (stdout.fileno(), *pass_fds)}
        arguments = (list(command[3:]), dict(env), inherited, stdout.fileno())
        self._process = context.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("stage", timeout or 0.0)
        return self._process.exitcode


def _run(words: list[str], environment: dict[str, str], inherited: dict[int, Any], output: int) -> None:
    os.setsid()
    here = {number: duplicate.detach() for number, duplicate in inherited.items()}
    os.dup2(here[output], 1)
    os.dup2(here[output], 2)
    os.environ.clear()
    os.environ.update(environment)
    for at, word in enumerate(words):
        if word in DESCRIPTORS:
            words[at + 1] = str(here[int(words[at + 1])])
    sys.argv = [stage.__file__, *words]
    code = stage.main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start(command: Sequence[str], **options: Any) -> Any:
    return (ForkedStage if list(command[:3]) == COMMAND else subprocess.Popen)(command, **options)


@pytest.fixture
def forked_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workflows of this test fork their stages."""
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(Popen=_start, **names))
