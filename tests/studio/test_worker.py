"""The processes beside the Studio: what they return, what they raise, what happens when one is killed."""

from __future__ import annotations

import os
import pickle
import signal

import pytest

from dittocache.errors import ConfigError, StageError
from dittocache.studio.state import Studio
from dittocache.studio.worker import WorkerProcesses


def _refuse() -> None:
    raise ConfigError("two things", ["this", "that"])


def _given(studio: Studio) -> tuple[int, dict[str, object]]:
    return os.getpid(), studio.draft.given


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def test_functions_run_elsewhere_and_errors_come_back(studio: Studio) -> None:
    studio.draft.set("name", "mine")
    worker = WorkerProcesses()
    try:
        pid, given = await worker.run(_given, studio)
        assert pid != os.getpid() and given == {"name": "mine"}
        with pytest.raises(ConfigError) as caught:
            await worker.run(_refuse)
        assert caught.value.problems == ("this", "that")
        with pytest.raises(StageError, match="ended from outside"):
            await worker.run(_die)
        assert (await worker.run(_given, studio))[1] == {"name": "mine"}
    finally:
        worker.close()


def test_a_studio_travels_without_what_is_of_its_process(studio: Studio) -> None:
    studio.memory["lock"] = lambda: None
    copied = pickle.loads(pickle.dumps(studio))
    assert copied.roots.folders == studio.roots.folders and copied.memory == {} and copied.home == studio.home
