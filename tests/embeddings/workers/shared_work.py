"""Workers of the toy family for tests: a session that stores what the toy encodes, and what it encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tests.embeddings.toy_family import ENCODERS, Job, ToyPipeline

from dittocache.embeddings.encoding.leases import FOLDER, Leases
from dittocache.embeddings.encoding.result import EncodeResult
from dittocache.embeddings.encoding.shard_worker import ShardWorker
from dittocache.embeddings.planning.plan import Need, Plan
from dittocache.errors import DataError
from dittocache.events import EventLog


@dataclass
class ToySession:
    """Encodes one sample at a time with the toy's encoder and stores every record that is asked for."""

    job: Job
    plan: Plan
    encoder: str | None
    replaces: bool = False
    asked: list[list[str]] = field(default_factory=list)

    @cached_property
    def pipe(self) -> ToyPipeline | None:
        if self.encoder is None:
            return None
        return self.job.family.load_pipeline(str(self.job.model), [self.encoder], self.plan.dtype, "cpu")

    def encode(self, needs: Sequence[Need]) -> EncodeResult:
        self.asked.append([need.sample.name for need in needs])
        family = self.job.family
        result = EncodeResult()
        for need in needs:
            try:
                [tensors] = family.encode(self.pipe, self.encoder, [need.sample], self.plan.sizes)
            except DataError:
                result.failed_samples.append(need.sample.name)
                continue
            for artifact, key in need.keys.items():
                family._log("record", [self.encoder, key])
                self.job.store.write(key, tensors[artifact], self.plan.recipe(key), replace=self.replaces)
                result.encoded += 1
        return result


def worker(
    job: Job, encoder: str | None, leases: Leases | None, plan: Plan | None = None, **settings: object
) -> tuple[ShardWorker, ToySession]:
    """A worker of the job and the session that it opens when it needs one."""
    plan = plan or job.plan()
    session = ToySession(job, plan, encoder, replaces="again" in settings)
    log = EventLog(job.folder / "events.jsonl", "cache")
    return ShardWorker(
        plan, encoder, job.batch_size, job.store, leases, lambda progress: session, log, **settings
    ), session  # type: ignore[arg-type]


def work(job: Job, seconds: float = 60.0) -> None:
    """Everything that one worker process does."""
    with Leases(job.store.root / FOLDER, seconds) as leases:
        for encoder in ENCODERS:
            worker(job, encoder, leases)[0].run()


def times_encoded(job: Job) -> Counter[str]:
    """How often each record was encoded, by whichever process."""
    return Counter(key for _, key in job.family.logged("record"))
