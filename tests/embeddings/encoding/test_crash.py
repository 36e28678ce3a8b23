"""Processes that are killed or work at once: nothing finished is lost or encoded again, nothing wrong is read."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
from tests.embeddings.encoding.test_encode import assert_all_cached
from tests.embeddings.toy_family import Job, make_job

from dittocache.embeddings.encoding.writing import BATCHES_IN_FLIGHT

KILLS = int(os.environ.get("DITTOCACHE_TEST_KILLS", "12"))


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Starts processes in milliseconds, torch already imported, so that kills fall into the work and not before it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.embeddings.toy_family"])
    return context


def run(job: Job) -> None:
    job.cache()


def started(processes: ForkServerContext, job: Job) -> ForkServerProcess:
    process = processes.Process(target=run, args=(job,))
    process.start()
    return process


def finished_samples(job: Job) -> set[tuple[str | None, str]]:
    """(encoder, sample) of everything whose records are all there, by a plan of what lies on the disk."""
    plan = job.plan()
    missing = {encoder: {sample.name for sample in plan.missing(encoder)} for encoder in plan.needs}
    return {(encoder, need.sample.name) for encoder, needs in plan.needs.items() for need in needs} - {
        (encoder, name) for encoder, names in missing.items() for name in names
    }


def test_killed_at_random_moments_nothing_finished_is_encoded_again(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    job = make_job(tmp_path, count=16, seconds=0.004, batch_size=2)
    warm = make_job(tmp_path / "warm", count=1)
    started(processes, warm).join()
    seed = random.SystemRandom().randrange(2**32)
    moments = random.Random(seed)
    killed = 0
    for _ in range(KILLS):
        finished = finished_samples(job)
        before = len(job.family.logged("encode"))
        process = started(processes, job)
        process.join(moments.uniform(0.02, 0.25))
        process.kill()
        process.join()
        killed += process.exitcode != 0
        encoded = {(encoder, name) for encoder, name in job.family.logged("encode")[before:]}
        assert not encoded & finished, f"encoded again after a kill (seed {seed})"
        reader_plan = job.plan()
        for key in reader_plan.stored:
            job.store.read(key)  # raises where a record is not whole
    assert not (job.store.root / "quarantine").exists(), f"seed {seed}"
    job.cache()
    assert_all_cached(job)
    times = Counter((encoder, name) for encoder, name in job.family.logged("encode"))
    # A kill loses at most the batch being encoded and those being written, of two samples each.
    assert sum(times.values()) - len(times) <= 2 * (1 + BATCHES_IN_FLIGHT) * killed, f"seed {seed}"
    assert killed >= KILLS // 3, f"only {killed} of {KILLS} kills fell into the work (seed {seed})"
    assert not list((job.store.root / "objects").glob("??/.*.tmp"))


def test_two_processes_at_once_encode_everything_right(tmp_path: Path, processes: ForkServerContext) -> None:
    job = make_job(tmp_path, count=12, seconds=0.004)
    both = [started(processes, job) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    times = Counter((encoder, name) for encoder, name in job.family.logged("encode"))
    assert max(times.values()) <= 2
    assert_all_cached(job)
    assert not list((job.store.root / "objects").glob("??/.*.tmp"))


def test_a_process_takes_over_what_another_has_stored_meanwhile(job: Job) -> None:
    plan = job.plan()
    job.cache()
    before = len(job.family.logged("encode"))
    result = job.encode(plan)  # as if planned before the other one began
    assert (result.encoded, result.reused) == (0, 42)
    assert len(job.family.logged("encode")) == before


def test_a_terminated_process_stores_its_batch_and_ends_as_terminated(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    job = make_job(tmp_path, count=16, seconds=0.02, batch_size=2)
    process = started(processes, job)
    deadline = time.monotonic() + 60
    while len(job.family.logged("encode")) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.terminate()
    process.join(60)
    assert process.exitcode == -15
    encoded = {(encoder, name) for encoder, name in job.family.logged("encode")}
    assert encoded == finished_samples(job) and 0 < len(encoded) < 16
