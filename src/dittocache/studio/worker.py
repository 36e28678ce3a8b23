"""Processes beside the Studio's for what needs torch or takes long: a page never waits while they import or compute."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec, Protocol, TypeVar

from dittocache.errors import StageError

P = ParamSpec("P")
T = TypeVar("T")

PROCESSES = 2  # one may verify a cache for minutes while the other answers


class Worker(Protocol):
    """Where the Studio's slow functions run."""

    async def run(self, what: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call a function of a module with values that can be pickled; what it raises is raised here."""
        ...

    def warm(self) -> None:
        """Begin to import what most functions need."""
        ...

    def close(self) -> None:
        """End what is running."""
        ...


class WorkerProcesses:
    """Worker processes, started when first needed, and anew after one was killed."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    async def run(self, what: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """As `Worker.run`; raises StageError where the process was killed meanwhile."""
        pool = self._started()
        try:
            return await asyncio.wrap_future(pool.submit(what, *arguments, **options))
        except BrokenProcessPool as error:
            self._pool = None
            raise StageError(
                "the process that worked on this was ended from outside, perhaps because memory ran out; try again"
            ) from error

    def warm(self) -> None:
        """As `Worker.warm`."""
        self._started().submit(_import_most)

    def close(self) -> None:
        """As `Worker.close`."""
        if self._pool is not None:
            for process in multiprocessing.active_children():
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=_leave_interrupts_to_the_studio)
        return self._pool


class WorkerThreads:
    """The same in threads of this process, for tests and for machines with little memory."""

    async def run(self, what: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """As `Worker.run`."""
        return await asyncio.to_thread(what, *arguments, **options)

    def warm(self) -> None:
        """Nothing is imported ahead."""

    def close(self) -> None:
        """Threads end with their functions."""


def _leave_interrupts_to_the_studio() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _import_most() -> None:
    import dittocache.jobs.training_memory  # noqa: F401
