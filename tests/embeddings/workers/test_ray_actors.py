"""Ray actors do the work of other workers; without Ray the error says how to get it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.embeddings.encoding.test_encode import assert_all_cached
from tests.embeddings.toy_family import Job, make_job
from tests.embeddings.workers.shared_work import times_encoded, work

from dittocache.embeddings.encoding.ray_actors import RayActors
from dittocache.errors import CacheError


def work_of_actor(job: Job, number: int) -> dict[str, Any]:
    work(job)
    return {"number": number}


def fail(number: int) -> dict[str, Any]:
    raise CacheError(f"actor {number} has no room")


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CacheError, match=r"pip install 'dittocache\[ray\]'.*set cache.runner to local"):
        RayActors(fail, 2)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray cluster of this machine alone; its processes talk over local sockets, and its state is its own."""
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": _path()}}
    )
    yield ray
    ray.shutdown()


def _path() -> str:
    return ":".join(path for path in sys.path if path)


@pytest.mark.enable_socket
@pytest.mark.timeout(300)
def test_two_actors_share_the_work_and_encode_each_record_once(tmp_path: Path, ray: Any) -> None:
    job = make_job(tmp_path, count=24, seconds=0.01)
    with RayActors(partial(work_of_actor, job), 2) as actors:
        assert actors.results() == [{"number": 1}, {"number": 2}]
    assert_all_cached(job)
    assert set(times_encoded(job).values()) == {1}


@pytest.mark.enable_socket
@pytest.mark.timeout(300)
def test_an_actor_that_fails_says_why(ray: Any) -> None:
    with RayActors(fail, 2) as actors:
        assert ["no room" in str(found) for found in actors.results()] == [True, True]
