"""One process holds a shard; whoever dies or falls silent loses it to exactly one other."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dittocache.embeddings.encoding.leases import Lease, Leases
from dittocache.embeddings.store import writer_id
from dittocache.errors import StoreUnavailableError

ELSEWHERE = "0123456789ab-4711"  # a process of another machine: nothing tells whether it lives


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store" / "leases"


@pytest.fixture
def leases(folder: Path) -> Iterator[Leases]:
    with Leases(folder) as opened:
        yield opened


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def silent_for(folder: Path, seconds: float) -> None:
    """Make every lease look as if nobody had touched it for so long."""
    for name in held(folder):
        status = os.stat(folder / name)
        os.utime(folder / name, (status.st_atime - seconds, status.st_mtime - seconds))


def leave_behind(folder: Path, name: str, owner: str, generation: int = 0) -> None:
    """What is left of a lease whose holder does nothing any more."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.{generation}").write_text(owner)


def dead_writer() -> str:
    """Id of a process of this machine that has ended."""
    code = "from dittocache.embeddings.store import writer_id; print(writer_id.current())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_shard_is_held_once_until_it_is_released(folder: Path, leases: Leases) -> None:
    other = Leases(folder, owner=ELSEWHERE)
    lease = leases.claim("a")
    assert lease is not None and lease.taken_from is None
    assert other.claim("a") is None
    assert leases.claim("a") is None
    assert other.holder_of("a") == writer_id.current()
    lease.release()
    assert other.holder_of("a") is None
    assert held(folder) == []
    assert other.claim("a") is not None
    other.close()


def test_shards_do_not_hinder_each_other(leases: Leases) -> None:
    assert leases.claim("a") is not None
    assert leases.claim("ab") is not None
    assert leases.claim("b") is not None


def test_a_block_gives_its_lease_back_after_an_error(folder: Path, leases: Leases) -> None:
    lease = leases.claim("a")
    with pytest.raises(ZeroDivisionError), lease or pytest.fail("not claimed"):
        _ = 1 / 0
    assert held(folder) == []


def test_a_lease_of_another_machine_is_taken_over_when_it_has_expired(folder: Path, leases: Leases) -> None:
    former = Leases(folder, owner=ELSEWHERE)
    lost = former.claim("a")
    silent_for(folder, 59)
    assert leases.claim("a") is None
    silent_for(folder, 2)
    taken = leases.claim("a")
    assert taken is not None and taken.taken_from == ELSEWHERE
    former.renew()
    assert lost is not None and lost.lost
    former.close()  # gives nothing back that belongs to the new holder
    assert leases.claim("a") is None and not taken.lost
    taken.release()
    assert held(folder) == []


def test_a_release_that_comes_too_late_leaves_the_new_holder_its_lease(folder: Path, leases: Leases) -> None:
    former = Leases(folder, owner=ELSEWHERE)
    late = former.claim("a")
    silent_for(folder, 61)
    taken = leases.claim("a")
    former.close()  # it has not noticed yet
    assert late is not None and taken is not None
    assert leases.holder_of("a") == leases.owner


def test_a_renewed_lease_does_not_expire(folder: Path, leases: Leases) -> None:
    former = Leases(folder, owner=ELSEWHERE)
    lease = former.claim("a")
    silent_for(folder, 61)
    former.renew()
    assert leases.claim("a") is None
    assert lease is not None and not lease.lost
    former.close()


def test_the_thread_renews_by_itself(folder: Path) -> None:
    with Leases(folder, seconds=0.04, owner=ELSEWHERE) as former:
        assert former.claim("a") is not None
        renewed = threading.Event()
        renew = former.renew
        former.renew = lambda: (renew(), renewed.set())  # type: ignore[assignment, func-returns-value]
        silent_for(folder, 3600)
        assert renewed.wait(30)
        with Leases(folder) as leases:
            assert leases.claim("a") is None
    assert held(folder) == []


def test_a_dead_process_of_this_machine_loses_its_lease_at_once(folder: Path, leases: Leases) -> None:
    gone = dead_writer()
    leave_behind(folder, "a", gone)
    taken = leases.claim("a")
    assert taken is not None and taken.taken_from == gone


def test_clocks_of_hosts_may_disagree(folder: Path, leases: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    former = Leases(folder, owner=ELSEWHERE)
    former.claim("a")
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert leases.claim("a") is None
    monkeypatch.setattr("time.time", lambda: 1e10)
    assert leases.claim("a") is None
    former.close()


def test_a_lease_whose_owner_is_not_written_yet_counts_as_held(folder: Path, leases: Leases) -> None:
    folder.mkdir(parents=True)
    (folder / "a.0").touch()
    assert leases.claim("a") is None
    silent_for(folder, 61)
    assert leases.claim("a") is not None


def test_a_thief_that_died_after_the_theft_is_robbed_in_turn(folder: Path, leases: Leases) -> None:
    leave_behind(folder, "a", ELSEWHERE)
    leave_behind(folder, "a", dead_writer(), generation=1)
    taken = leases.claim("a")
    assert taken is not None and taken.generation == 2
    taken.release()
    assert held(folder) == []


def test_sweeping_removes_what_the_dead_left_and_nothing_else(folder: Path, leases: Leases) -> None:
    gone = dead_writer()
    leave_behind(folder, "dead", gone)
    (folder / f".clock.{gone}").touch()
    leave_behind(folder, "silent", ELSEWHERE)
    silent_for(folder, 61)
    leave_behind(folder, "alive", ELSEWHERE)
    leases.claim("mine")
    assert leases.sweep() == 2
    assert held(folder) == ["alive.0", "mine.0"]
    assert not (folder / f".clock.{gone}").exists()


def test_closing_gives_everything_back_and_leaves_no_file(folder: Path) -> None:
    with Leases(folder) as leases:
        for name in "abc":
            leases.claim(name)
        leases._now()
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError, match=r"leases cannot be written to .*file/leases .*cache_dir"):
        Leases(tmp_path / "file" / "leases").claim("a")


@pytest.mark.parametrize("abandoned", [False, True], ids=["free", "abandoned"])
def test_of_eight_threads_exactly_one_wins_in_each_of_200_rounds(folder: Path, abandoned: bool) -> None:
    threads, rounds = 8, 200
    start = threading.Barrier(threads + 1)
    end = threading.Barrier(threads + 1)
    won: list[Lease | None] = [None] * threads
    everyone = [Leases(folder, owner=f"0123456789ab-{number}") for number in range(threads)]
    names = [f"round-{number}" for number in range(rounds)]

    def race(number: int) -> None:
        for name in names:
            start.wait()
            won[number] = everyone[number].claim(name)
            end.wait()

    racers = [threading.Thread(target=race, args=(number,)) for number in range(threads)]
    for racer in racers:
        racer.start()
    winners = []
    for name in names:
        if abandoned:
            leave_behind(folder, name, ELSEWHERE)
            os.utime(folder / f"{name}.0", (1, 1))
        start.wait()
        end.wait()
        winners.append(sum(lease is not None for lease in won))
    for racer in racers:
        racer.join()
    for one in everyone:
        one.close()
    assert winners == [1] * rounds


def claim_all(folder: Path, names: list[str], number: int, results: Path) -> None:
    with Leases(folder, owner=f"fedcba987654-{number}") as leases:
        won = [name for name in names if leases.claim(name) is not None]
        (results / str(number)).write_text(" ".join(won))
        (results / f"{number}.done").touch()
        while len(list(results.glob("*.done"))) < 4:
            time.sleep(0.001)  # hold what was won until everyone has tried


def test_processes_that_rob_the_same_dead_worker_share_its_shards(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dittocache.embeddings.encoding.leases"])
    names = [f"shard-{number}" for number in range(100)]
    for name in names:
        leave_behind(folder, name, ELSEWHERE)
        os.utime(folder / f"{name}.0", (1, 1))
    results = tmp_path / "results"
    results.mkdir()
    processes = [context.Process(target=claim_all, args=(folder, names, number, results)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    won = [name for number in range(4) for name in (results / str(number)).read_text().split()]
    assert sorted(won) == sorted(names)
