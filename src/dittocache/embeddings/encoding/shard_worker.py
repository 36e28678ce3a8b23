"""One worker: claims shards of one encoder's work until nothing is left that it could do.

Any number of workers, in threads, processes or on hosts, may run this for the same store at the same time. Each takes
the shards that no other holds, and those whose holders have died.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

from dittocache.embeddings.encoding.leases import FOLDER, Leases
from dittocache.embeddings.encoding.shards import Shard, make_shards
from dittocache.embeddings.planning.plan import Need, Plan
from dittocache.embeddings.store.store import Store
from dittocache.events import EventLog

POLL_SECONDS = 0.5
"""How often a worker that waits for others looks whether they are done or gone."""


class Session(Protocol):
    """An encoder that can be asked for records; it stores what it makes, and names the samples that it could not."""

    def encode(self, needs: Sequence[Need]) -> Sequence[str]:
        """Encode and store these records; returns the names of samples that cannot be encoded."""
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
        open_session: loads the encoder; called once, when there is something to encode.
        log: receives messages.
        waits: whether to stay until the shards of others are done too, ready to take them over. One worker of a run
            must; the others end as soon as there is nothing to claim.
        base_of: as for `make_shards`, where records share rows.
    """

    def __init__(
        self,
        plan: Plan,
        encoder: str | None,
        batch_size: int,
        store: Store,
        leases: Leases | None,
        open_session: Callable[[], Session],
        log: EventLog,
        waits: bool = True,
        base_of: Callable[[str], str | None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._plan = plan
        self._encoder = encoder
        self._batch_size = batch_size
        self._store = store
        self._leases = leases
        self._open_session = open_session
        self._log = log
        self._waits = waits
        self._base_of = base_of
        self._sleep = sleep
        self._session: Session | None = None
        self._at_once = 1
        self._failed: set[str] = set()
        self._done: set[str] = set()

    def run(self) -> None:
        """Encode until every record is stored, except those of samples that cannot be encoded.

        Raises what the session raises, and StoreUnavailableError when leases cannot be written.
        """
        while shards := self._unfinished_shards():
            failed_before = len(self._failed)
            self._work_off(shards)
            if len(self._failed) == failed_before:
                return  # else samples that share a record with a failed one have to make it

    def _unfinished_shards(self) -> list[Shard]:
        if not self._plan.work(self._encoder):
            return []
        shards = make_shards(self._plan.needs[self._encoder], self._batch_size, self._failed, self._base_of)
        self._at_once = max((len(shard.needs) for shard in shards), default=1)
        return [shard for shard in shards if any(not self._is_stored(key) for key in shard.keys)]

    def _is_stored(self, key: str) -> bool:
        return key in self._done or key in self._plan.stored

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
            shards = held

    def _encode_what_is_free(self, shards: Sequence[Shard]) -> list[Shard]:
        """Encode every shard that nobody holds; returns the others.

        Shards of which little is missing are encoded together: one new sample here and there must not make batches
        of one.
        """
        held = []
        needs: list[Need] = []
        with ExitStack() as leases:
            for shard in shards:
                if not self._claim(shard, leases):
                    held.append(shard)
                    continue
                needs += self._missing_of(shard)
                if len(needs) >= self._at_once or not needs:
                    self._encode(needs)
                    needs = []
                    leases.close()
            self._encode(needs)
        return held

    def _claim(self, shard: Shard, leases: ExitStack) -> bool:
        if self._leases is None:
            return True
        lease = self._leases.claim(shard.name)
        if lease is None:
            return False
        leases.enter_context(lease)
        if lease.taken_from is not None:
            self._log.message(
                f"worker {lease.taken_from or 'without a name'} is gone: taking over its shard", "warning"
            )
        return True

    def _missing_of(self, shard: Shard) -> list[Need]:
        """What is still missing of a shard: others may have stored some of it since the plan was made."""
        self._done.update(self._store.sizes(shard.keys))
        found = []
        for need in shard.needs:
            missing = {artifact: key for artifact, key in need.keys.items() if not self._is_stored(key)}
            if missing:
                found.append(Need(need.sample, missing))
        return found

    def _encode(self, needs: Sequence[Need]) -> None:
        if not needs:
            return
        if self._session is None:
            self._session = self._open_session()
        self._failed.update(self._session.encode(needs))
        self._done.update(key for need in needs for key in need.keys.values())


def open_leases(store: Store, seconds: float, log: EventLog) -> Leases | None:
    """The leases of a store; None, said once, where it has no folder that workers could share."""
    if store.is_local:
        return Leases(store.root / FOLDER, seconds)
    log.message(f"{store.location} keeps no leases: several workers may encode the same record; it is stored once")
    return None
