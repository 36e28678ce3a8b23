"""One worker: claims shards of one encoder's work until nothing is left that it could do.

Any number of workers, in threads, processes or on hosts, may run this for the same store at the same time. Each takes
the shards that no other holds, and those whose holders have died.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from dittocache.embeddings.encoding.leases import FOLDER, Leases
from dittocache.embeddings.encoding.result import EncodeResult
from dittocache.embeddings.encoding.shards import Shard, make_shards
from dittocache.embeddings.encoding.stopping import HeldSignals
from dittocache.embeddings.planning.plan import Need, Plan
from dittocache.embeddings.store.storage import base_key_of
from dittocache.embeddings.store.store import Store
from dittocache.events import EventLog, Progress

POLL_SECONDS = 0.5
"""How often a worker that waits for others looks whether they are done or gone."""


class Session(Protocol):
    """An encoder that stores what it is asked for: an `EncoderSession`."""

    def encode(self, needs: Sequence[Need]) -> EncodeResult:
        """Encode and store these records."""
        ...


class ShardWorker:
    """The loop of one worker for one encoder.

    Args:
        plan: made by this worker; others may have made theirs earlier or later.
        encoder: whose work it is; None for plain facts.
        batch_size: samples that the encoder takes at once; the same for all workers, or they cut different shards.
        store: where the records go.
        leases: shared with the other workers; None where there is no folder that all of them see: then records may be
            encoded by several workers, and each is stored once.
        open_session: called once, when there is something to encode; the progress is that of the whole loop.
        log: receives messages and progress.
        signals: held back while an encoder works; delivered between shards and while waiting.
        waits: whether to stay until the shards of others are done too, ready to take them over. One worker of a run
            must; the others end as soon as there is nothing to claim.
        again: encode everything once more, stored or not: a folder, shared by the workers and empty when they begin,
            that remembers which shards are done.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        plan: Plan,
        encoder: str | None,
        batch_size: int,
        store: Store,
        leases: Leases | None,
        open_session: Callable[[Progress], Session],
        log: EventLog,
        *,
        signals: HeldSignals | None = None,
        waits: bool = True,
        again: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.result = EncodeResult()
        self._plan = plan
        self._encoder = encoder
        self._batch_size = batch_size
        self._store = store
        self._leases = leases
        self._open_session = open_session
        self._log = log
        self._signals = signals or HeldSignals()
        self._waits = waits
        self._again = again
        self._sleep = sleep
        self._session: Session | None = None
        self._progress = Progress(log, 0)
        self._at_once = 1
        self._done: set[str] = set()

    def run(self) -> EncodeResult:
        """Encode until every record is stored, except those of samples that cannot be encoded; what was done.

        Raises what the session raises, and StoreUnavailableError when leases cannot be written.
        """
        while shards := self._unfinished_shards():
            failed_before = len(self.result.failed_samples)
            self._progress.total += sum(len(self._missing_needs(shard)) for shard in shards)
            self._work_off(shards)
            if len(self.result.failed_samples) == failed_before:
                break
            self._again = None  # what is left: records that samples share with a failed one, which have to make them
        return self.result

    def _unfinished_shards(self) -> list[Shard]:
        needs = self._plan.needs[self._encoder]
        # The plan knows at once which samples miss something; asking it for each key of a large set would take seconds.
        work = self._plan.work(self._encoder) if self._again is None else needs
        if not work:
            return []
        names = {need.sample.name for need in work}
        failed = set(self.result.failed_samples)
        shards = make_shards(needs, self._batch_size, failed, self._base_of())
        self._at_once = max((len(shard.needs) for shard in shards), default=1)
        touched = (shard for shard in shards if any(need.sample.name in names for need in shard.needs))
        return [shard for shard in touched if self._missing_needs(shard)]

    def _base_of(self) -> Callable[[str], str | None] | None:
        return (lambda key: base_key_of(self._plan.recipe(key))) if self._plan.storage.shared_prefix else None

    def _missing_needs(self, shard: Shard) -> list[Need]:
        """What has to be encoded of a shard, as far as this worker knows."""
        if self._again is not None and (self._again / shard.name).exists():
            return []
        found = []
        for need in shard.needs:
            missing = {artifact: key for artifact, key in need.keys.items() if not self._is_stored(key)}
            if missing:
                found.append(Need(need.sample, missing))
        return found

    def _is_stored(self, key: str) -> bool:
        return key in self._done or (self._again is None and key in self._plan.stored)

    def _work_off(self, shards: list[Shard]) -> None:
        told = False
        while shards:
            held = self._encode_what_is_free(shards)
            if len(held) == len(shards):
                if not self._waits:
                    return
                if not told:
                    told = True
                    self._log.message(f"{len(held)} shards are being encoded by other processes; waiting for them")
                self._sleep(POLL_SECONDS)
                self._signals.deliver()
            shards = held

    def _encode_what_is_free(self, shards: Sequence[Shard]) -> list[Shard]:
        """Encode every shard that nobody holds; returns the others.

        Shards of which little is missing are encoded together: one new sample here and there must not make batches
        of one.
        """
        held: list[Shard] = []
        taken: list[Shard] = []
        needs: list[Need] = []
        with ExitStack() as claimed:
            for shard in shards:
                if not self._claim(shard, claimed):
                    held.append(shard)
                    continue
                taken.append(shard)
                needs += self._still_missing(shard)
                if len(needs) >= self._at_once or not needs:
                    self._finish(taken, needs)
                    taken, needs = [], []
                    claimed.close()
            self._finish(taken, needs)
        return held

    def _claim(self, shard: Shard, claimed: ExitStack) -> bool:
        """Take a shard until `claimed` is closed; False while another worker holds it."""
        if self._leases is not None:
            lease = self._leases.claim(shard.name)
            if lease is None:
                return False
            claimed.enter_context(lease)
            if lease.taken_from is not None:
                holder = lease.taken_from or "without a name"
                self._log.message(f"worker {holder} is gone: taking over what it was encoding", level="warning")
        return True

    def _still_missing(self, shard: Shard) -> list[Need]:
        """What is missing of a claimed shard now: others may have stored some of it since the plan was made."""
        expected = len(self._missing_needs(shard))
        if self._again is None:
            found = self._store.sizes({key for key in shard.keys if not self._is_stored(key)})
            self._done.update(found)
            self.result.reused += len(found)
        needs = self._missing_needs(shard)
        if len(needs) < expected:
            self._progress.advance(expected - len(needs))
        return needs

    def _finish(self, shards: Sequence[Shard], needs: Sequence[Need]) -> None:
        """Encode what is missing of claimed shards."""
        self._signals.deliver()
        if needs:
            if self._session is None:
                self._session = self._open_session(self._progress)
            self.result.add(self._session.encode(needs))
            self._done.update(key for need in needs for key in need.keys.values())
        if self._again is not None:
            self._again.mkdir(parents=True, exist_ok=True)
            for shard in shards:
                (self._again / shard.name).touch()


def open_leases(store: Store, seconds: float, log: EventLog) -> Leases | None:
    """The leases of a store; None, said once, where it has no folder that workers could share."""
    if store.is_local:
        return Leases(store.root / FOLDER, seconds)
    log.message(f"{store.location} keeps no leases: several workers may encode the same record; it is stored once")
    return None
