"""Workers share the work: each record is encoded, by whoever is left, and seldom twice."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from tests.embeddings.encoding.test_encode import assert_all_cached
from tests.embeddings.toy_family import ENCODERS, Job, make_job
from tests.embeddings.workers.shared_work import times_encoded, work, worker

from dittocache.embeddings.encoding.leases import FOLDER, Leases
from dittocache.embeddings.encoding.result import EncodeResult
from dittocache.embeddings.encoding.session import EncoderSession
from dittocache.embeddings.encoding.shards import make_shards
from dittocache.embeddings.planning.plan import Need
from dittocache.embeddings.store import writer_id
from dittocache.events import EventLog, read_events

ELSEWHERE = "0123456789ab-4711"


@pytest.fixture
def leases(job: Job) -> Leases:
    return Leases(job.store.root / FOLDER)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.embeddings.workers.shared_work"])
    return context


def messages(job: Job) -> list[str]:
    return [event["text"] for event in read_events(job.folder / "events.jsonl") if event["kind"] == "message"]


def age(folder: Path, seconds: float) -> None:
    """Make every lease look as if nobody had renewed it for so long."""
    for path in folder.glob("*.*"):
        if not path.name.startswith("."):
            os.utime(path, (0, path.stat().st_mtime - seconds))


def test_one_worker_encodes_everything_once_and_leaves_no_lease(job: Job) -> None:
    work(job)
    assert_all_cached(job)
    assert set(times_encoded(job).values()) == {1}
    assert list((job.store.root / FOLDER).iterdir()) == []


def test_nothing_is_loaded_where_nothing_is_missing(job: Job, leases: Leases) -> None:
    work(job)
    loads = len(job.family.logged("load"))
    work(job)
    assert len(job.family.logged("load")) == loads


def test_a_worker_that_planned_before_another_was_done_encodes_nothing_again(job: Job, leases: Leases) -> None:
    plan = job.plan()
    work(job)
    late, session = worker(job, "vae", leases, plan)
    late.run()
    assert session.asked == []


def test_a_worker_takes_other_shards_and_does_not_wait_unless_it_leads(job: Job, leases: Leases) -> None:
    first, *others = make_shards(job.plan().needs["vae"], job.batch_size)
    other = Leases(leases.folder, owner=ELSEWHERE)
    assert other.claim(first.name) is not None
    helper, session = worker(job, "vae", leases, waits=False)
    helper.run()
    encoded = {name for names in session.asked for name in names}
    assert encoded == {need.sample.name for shard in others for need in shard.needs}
    other.close()


def test_the_leading_worker_waits_says_so_and_finds_what_the_other_has_stored(job: Job, leases: Leases) -> None:
    [first, *_] = make_shards(job.plan().needs["vae"], job.batch_size)
    other = Leases(leases.folder, owner=ELSEWHERE)
    lease = other.claim(first.name)
    assert lease is not None
    naps = []

    def other_finishes(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            session.encode(first.needs)
            lease.release()

    leader, session = worker(job, "vae", leases, sleep=other_finishes)
    leader.run()
    assert len(naps) == 3
    assert [text for text in messages(job) if "waiting" in text] == [
        "1 shards are being encoded by other processes; waiting for them"
    ]
    assert set(times_encoded(job).values()) == {1}
    assert job.plan().missing("vae") == []


def test_the_shard_of_a_silent_worker_is_taken_over_when_its_lease_has_expired(job: Job, leases: Leases) -> None:
    [first, *_] = make_shards(job.plan().needs["vae"], job.batch_size)
    silent = Leases(leases.folder, owner=ELSEWHERE)
    silent.claim(first.name)
    naps = []

    def pass_time(seconds: float) -> None:
        naps.append(seconds)
        age(leases.folder, 25)

    worker(job, "vae", leases, sleep=pass_time)[0].run()
    assert len(naps) == 3  # 25, 50, 75 seconds of silence
    assert any("is gone: taking over" in text and ELSEWHERE in text for text in messages(job))
    assert job.plan().missing("vae") == []


def test_what_is_missing_here_and_there_is_encoded_in_full_batches(tmp_path: Path) -> None:
    job = make_job(tmp_path, count=64, batch_size=4)
    plan = job.plan()
    with Leases(job.store.root / FOLDER) as leases:
        complete, session = worker(job, "vae", leases, plan)
        for need in plan.needs["vae"][:]:
            if int(need.sample.name[-2:]) % 8:
                session.encode([need])
        worker_of_rest, rest = worker(job, "vae", leases)
        worker_of_rest.run()
    assert [len(names) for names in rest.asked] == [4, 4]
    assert job.plan().missing("vae") == []


def test_a_sample_that_shares_a_record_with_a_broken_one_makes_it(job: Job, leases: Leases) -> None:
    broken, healthy = job.samples[:2]
    job.samples[1] = replace(healthy, controls=broken.controls)
    job.plan()
    content = broken.target.read_bytes()
    twin = replace(broken, name="broken", target=broken.target.with_name("broken.bmp"))
    twin.target.write_bytes(content[:60])  # its own latents cannot be made; its control picture is fine
    job.samples.insert(0, twin)
    vae, _ = worker(job, "vae", leases)
    vae.run()
    assert {sample.name for sample in job.plan().missing("vae")} == {"broken"}


def test_encoding_again_replaces_every_record_once_however_many_workers_there_are(job: Job, leases: Leases) -> None:
    work(job)
    before = {path: path.stat().st_mtime_ns for path in job.store.root.glob("objects/*/*.safetensors")}
    again = job.folder / "again"
    for encoder in ENCODERS:
        for _ in range(2):
            worker(job, encoder, leases, again=again)[0].run()
    assert all(path.stat().st_mtime_ns > written for path, written in before.items())
    assert set(times_encoded(job).values()) == {2}
    assert_all_cached(job)


def test_a_shard_that_was_not_finished_is_not_counted_as_encoded_again(job: Job, leases: Leases) -> None:
    work(job)
    stopped, session = worker(job, "vae", leases, again=job.folder / "again")
    encode, calls = session.encode, []

    def stop_in_the_second_shard(needs: Sequence[Need]) -> EncodeResult:
        calls.append(needs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(needs)

    session.encode = stop_in_the_second_shard  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert list(leases.folder.glob("[!.]*")) == []  # given back
    rest, session = worker(job, "vae", leases, again=job.folder / "again")
    rest.run()
    assert len(session.asked) == 2  # of three shards


def test_progress_counts_every_sample_whoever_encoded_it(job: Job, leases: Leases) -> None:
    [first, *_] = make_shards(job.plan().needs["vae"], job.batch_size)
    plan = job.plan()
    worker(job, "vae", leases)[1].encode(first.needs)
    late, _ = worker(job, "vae", leases, plan)
    late._session = EncoderSession(
        plan, "vae", job.family, "cpu", job.store, EventLog(Path(os.devnull), "x"), progress=late._progress
    )
    with late._session:
        late.run()
    assert (late._progress.done, late._progress.total) == (6, 6)
    assert job.plan().missing("vae") == []


def test_without_leases_everything_is_encoded_all_the_same(job: Job) -> None:
    for encoder in ENCODERS:
        worker(job, encoder, None)[0].run()
    assert_all_cached(job)


def start(processes: ForkServerContext, job: Job, *settings: object) -> ForkServerProcess:
    process = processes.Process(target=on_a_host, args=(job, *settings))
    process.start()
    return process


def on_a_host(job: Job, machine: str = "", home: str = "", together: Barrier | None = None) -> None:
    """A worker process; `machine` makes it one of another host, with folders of its own."""
    if together is not None:
        together.wait()
    if machine:
        writer_id._machine.cache_clear()
        writer_id._machine = lambda: machine  # type: ignore[assignment]
        os.environ |= {"TMPDIR": home, "HOME": home}
    work(job)


def test_four_processes_over_overlapping_sets_encode_each_record_at_most_twice(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    whole = make_job(tmp_path, count=24, seconds=0.002)
    first, second = replace(whole, samples=whole.samples[:16]), replace(whole, samples=whole.samples[8:])
    workers = [start(processes, job) for job in (first, second, first, second)]
    for process in workers:
        process.join(60)
    assert [process.exitcode for process in workers] == [0] * 4
    assert_all_cached(whole)
    times = times_encoded(whole)
    assert len(times) == 24 * 7 and max(times.values()) <= 2
    alone = {key for need in whole.plan().needs["vae"][:8] for key in need.keys.values()}
    assert {times[key] for key in alone} == {1}, "two workers of one set encoded the same shard"


def test_two_hosts_share_one_store(tmp_path: Path, processes: ForkServerContext) -> None:
    job = make_job(tmp_path, count=24, seconds=0.03)
    hosts = []
    together = processes.Barrier(2)
    for machine in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        home = tmp_path / machine
        home.mkdir()
        hosts.append(start(processes, job, machine, str(home), together))
    for process in hosts:
        process.join(60)
    assert [process.exitcode for process in hosts] == [0, 0]
    assert_all_cached(job)
    assert set(times_encoded(job).values()) == {1}
    assert len(job.family.logged("load")) > 2, "one of the hosts had nothing to do"


@pytest.mark.parametrize("machine", ["", "aaaaaaaaaaaa"], ids=["same host", "other host"])
def test_after_kill_9_in_mid_shard_another_takes_over(
    tmp_path: Path, processes: ForkServerContext, machine: str
) -> None:
    job = make_job(tmp_path, count=12, seconds=0.01, batch_size=4)
    process = start(processes, job, machine, str(tmp_path))
    deadline = time.monotonic() + 60
    while len(job.family.logged("encode")) < 6 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    folder = job.store.root / FOLDER
    assert [path for path in folder.iterdir() if not path.name.startswith(".")], "killed too late: no lease is left"
    naps: list[float] = []

    def pass_time(seconds: float) -> None:
        naps.append(seconds)
        age(folder, 61)

    with Leases(folder) as leases:
        for encoder in ENCODERS:
            worker(job, encoder, leases, sleep=pass_time)[0].run()
    assert_all_cached(job)
    assert bool(naps) == bool(machine)  # whether a process lives can be asked on one's own machine only
    times = times_encoded(job)
    assert sum(times.values()) - len(times) <= 4  # what the killed one had encoded and not yet stored
