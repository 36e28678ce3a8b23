"""Processes that are killed while they write, pack and collect, beside readers: nothing finished is lost or misread.

The number of kills is DITTOCACHE_KILLS, 12 without it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from tests.embeddings.store.records import assert_right, fill, key, recipe, tensor

from dittocache.embeddings.store.gc import collect, plan_gc
from dittocache.embeddings.store.packing import pack_records
from dittocache.embeddings.store.roots import register
from dittocache.embeddings.store.store import Store

KILLS = int(os.environ.get("DITTOCACHE_KILLS", "12"))
LIVE = 100_000  # numbers from here on belong to no run


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Starts processes in milliseconds, torch already imported, so that kills fall into the work and not before it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.embeddings.store.test_kills"])
    return context


@pytest.fixture
def report(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Puts a line into the test's output, captured or not."""

    def write(line: str) -> None:
        record_property("kills", line)
        plugins: Any = request.config.pluginmanager
        terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
        if terminal is not None and capture is not None:
            with capture.global_and_fixture_disabled():
                terminal.write_line(f"\n{line}")

    return write


def churn(root: Path, first: int, acknowledged: Connection) -> None:
    """Write records of the run and of nobody, pack and collect, for ever; tells which of the run's are finished."""
    os.fsync = lambda _: None  # type: ignore[assignment]  # a killed process loses nothing that it gave to the system
    store = Store(root)
    numbers = itertools.count(first)
    for unused in itertools.count(LIVE + 1000 * first, 5):
        acknowledged.send("writing")
        for number in itertools.islice(numbers, 6):
            store.write(key(number), tensor(number), recipe(number))
            acknowledged.send(number)
        fill(store, range(unused, unused + 5))
        acknowledged.send("packing")
        pack_records(store, pack_bytes=6000)
        fill(store, range(unused + LIVE, unused + LIVE + 3))
        acknowledged.send("collecting")
        collect(store, plan_gc(store, min_age_seconds=0))


class Reader(threading.Thread):
    """Reads finished records at random through one store that it opened before anything was packed."""

    def __init__(self, store: Store, finished: list[int]) -> None:
        super().__init__()
        self.store = store
        self.finished = finished
        self.reads = 0
        self.error: BaseException | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        choose = random.Random(5)
        try:
            while not self.stopping.is_set():
                number = choose.choice(self.finished)
                assert_right(self.store, range(number, number + 1))
                self.reads += 1
        except BaseException as error:
            self.error = error


@pytest.mark.timeout(60 + 5 * KILLS)
def test_killed_at_random_moments_of_writing_packing_and_collecting(
    tmp_path: Path, processes: ForkServerContext, report: Callable[[str], None]
) -> None:
    store = Store(tmp_path / "cache")
    manifest = tmp_path / "run" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text("{}")
    register(store, manifest, [key(number) for number in range(40 * KILLS)], saved=True)
    fill(store, range(4))
    finished = list(range(4))
    reader = Reader(Store(store.root), finished)
    reader.start()
    moments = random.Random(11)
    doing: Counter[str] = Counter()
    try:
        for wanted in itertools.islice(itertools.cycle(("writing", "packing", "collecting")), KILLS):
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = processes.Process(target=churn, args=(store.root, finished[-1] + 1, sender))
            process.start()
            sender.close()
            while (told := receiver.recv()) != wanted:
                if isinstance(told, int):
                    finished.append(told)
            phase = wanted
            time.sleep(moments.uniform(0, 0.08))
            process.kill()
            process.join()
            while True:
                try:
                    told = receiver.recv()
                except EOFError:
                    break
                if isinstance(told, int):
                    finished.append(told)
                else:
                    phase = told
            doing[phase] += 1
            assert reader.error is None, reader.error
            assert_right(Store(store.root), range(finished[-1] + 1))
    finally:
        reader.stopping.set()
        reader.join()
    assert finished == list(range(finished[-1] + 1))
    pack_records(store)
    collect(store, plan_gc(store, min_age_seconds=0))
    assert_right(store, range(finished[-1] + 1))
    unacknowledged = {key(number) for number in (finished[-1] + 1, finished[-1] + 2)}
    assert set(store.keys()) - unacknowledged == {key(number) for number in finished}
    assert len(list(store.keys())) == len(set(store.keys()))
    assert not (store.root / "quarantine").exists()
    assert not list((store.root / "objects").rglob("*.safetensors")) and not list(store.root.rglob("*.tmp"))
    indexed = set(store.local.packed.snapshot.index.packs)
    assert {path.name for path in (store.root / "packs").glob("*.safetensors")} == {
        f"{one}.safetensors" for one in indexed
    }
    report(
        f"{KILLS} kills ({dict(doing)}): {len(finished)} finished records, "
        f"{reader.reads} reads beside it, none lost, none wrong"
    )
