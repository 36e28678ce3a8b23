"""Workers as Ray actors: the same shard worker, on whichever machines a Ray cluster has. Needs the extra `ray`.

Every machine must see the store, the data set and the checkpoint under the same paths. Leases in the store's folder
share out the work, as between any other workers; Ray only starts and ends them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from dittocache.errors import CacheError

Work = Callable[[int], dict[str, Any]]
_TICK_SECONDS = 5.0


class RayActors:
    """Starts `count` actors; a context manager that ends them all.

    Args:
        work: what an actor does, given its number from 1 on; must be picklable by reference (a function of a module,
            `functools.partial` of one).
        gpus: GPUs that each actor gets for itself; Ray shows it no others.

    Raises CacheError when Ray is not installed or cannot start.
    """

    def __init__(self, work: Work, count: int, gpus: float = 0) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise CacheError(
                f"cache.runner is 'ray', but Ray cannot be imported ({error}); install it with "
                "`pip install 'dittocache[ray]'`, or set cache.runner to local"
            ) from error
        self._work = work
        self._count = count
        self._gpus = gpus
        self._actors: list[Any] = []
        self._pending: list[Any] = []
        self._started_ray = False

    def __enter__(self) -> RayActors:
        if not self._ray.is_initialized():
            try:
                self._ray.init(address="auto", log_to_driver=False)
            except ConnectionError:
                self._ray.init(include_dashboard=False, log_to_driver=False)  # no cluster: one of this machine
            self._started_ray = True
        actor = self._ray.remote(num_gpus=self._gpus, num_cpus=0 if self._gpus else 1)(_Actor)
        self._actors = [actor.remote() for _ in range(self._count)]
        self._pending = [one.run.remote(self._work, number) for number, one in enumerate(self._actors, start=1)]
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()

    def results(self, tick: Callable[[], None] = lambda: None) -> list[dict[str, Any] | str]:
        """Wait for all actors: what each one's work returned, or in words why it failed.

        Args:
            tick: called every few seconds meanwhile.
        """
        while self._ray.wait(self._pending, num_returns=len(self._pending), timeout=_TICK_SECONDS)[1]:
            tick()
        found: list[dict[str, Any] | str] = []
        for pending in self._pending:
            try:
                found.append(self._ray.get(pending))
            except self._ray.exceptions.RayError as error:
                found.append(str(error).strip().splitlines()[-1])
        return found


class _Actor:
    def run(self, work: Work, number: int) -> dict[str, Any]:
        return work(number)
