"""What the caches did in a session: one record a call of the transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dittocache.errors import StepCacheError


@dataclass
class StepRecord:
    """One call of the transformer.

    Attributes:
        run: counts denoising runs of the session from 1.
        step: counts from 0 within the run.
        branch: the CFG branch.
        decision: `computed` or `skipped` (the blocks did not run).
        cause: why, in words; empty without TeaCache.
        distance: relative L1 distance to the step before, where it was measured.
        references: `computed` or `reused` where the reference KV cache ran, else None.
        seconds: wall time of the call on a CPU, time on the device on CUDA.
        rows, rows_computed: samples in the batch, and those of them that were computed.
        drift: how far the references' keys had moved from what was kept or predicted, relative, where they were
            computed anew.
        work: share of the blocks' work on all tokens of the batch.
    """

    run: int
    step: int
    branch: str
    decision: str
    cause: str
    distance: float | None
    references: str | None
    seconds: float
    rows: int = 1
    rows_computed: int = 1
    drift: float | None = None
    work: float = 1.0


class Trace:
    """Fills while a session runs; times on CUDA, and drifts, are in when the session has ended."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.bytes_held = 0
        """Most memory that the caches held at a time, in bytes on the device."""
        self.host_bytes_held = 0
        """The same on the host, of references that are offloaded."""
        self.reference_bytes_predicted = 0
        """Of `bytes_held`, what references were expected to take, when they were about to be kept."""
        self.notes: list[str] = []
        """Remarks for the user: a cache that never triggered, settings that cannot work."""

    @property
    def computed(self) -> int:
        """Calls that ran the transformer blocks."""
        return sum(step.decision == "computed" for step in self.steps)

    @property
    def skipped(self) -> int:
        """Calls that did not."""
        return len(self.steps) - self.computed

    @property
    def passes(self) -> float:
        """Calls that ran the transformer blocks, each by its share of the blocks' work."""
        return sum(step.work for step in self.steps)

    @property
    def references_reused(self) -> int:
        """Calls that ran without reference tokens, on kept keys and values."""
        return sum(step.references == "reused" for step in self.steps)

    @property
    def seconds(self) -> float:
        """Time within the transformer."""
        return sum(step.seconds for step in self.steps)

    def schedule(self, run: int | None = None) -> tuple[int, ...]:
        """Steps of a run in which any branch was computed, for `TeaCacheConfig(gate="schedule", schedule=...)`.

        The last run when left out; raises StepCacheError where the transformer was not called.
        """
        number = max((step.run for step in self.steps), default=0) if run is None else run
        found = sorted({step.step for step in self.steps if step.run == number and step.decision == "computed"})
        if not found:
            raise StepCacheError(f"the trace has no computed step of run {number}; call the pipeline in the session")
        return tuple(found)

    def summary(self) -> str:
        """The session in words, one line a run and branch."""
        lines = []
        for run, branch in dict.fromkeys((step.run, step.branch) for step in self.steps):
            steps = [step for step in self.steps if (step.run, step.branch) == (run, branch)]
            lines.append(f"run {run}, {branch}: {_describe(steps)}")
        held = f"the caches held at most {self.bytes_held / 1e6:.1f} MB" if self.bytes_held else "no cache held memory"
        if self.reference_bytes_predicted:
            held += f" ({self.reference_bytes_predicted / 1e6:.1f} MB expected for references)"
        if self.host_bytes_held:
            held += f", and {self.host_bytes_held / 1e6:.1f} MB on the host"
        return "\n".join([*(lines or ["the transformer was not called"]), held, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "computed": self.computed,
            "skipped": self.skipped,
            "references_reused": self.references_reused,
            "passes": self.passes,
            "seconds": self.seconds,
            "bytes_held": self.bytes_held,
            "host_bytes_held": self.host_bytes_held,
            "reference_bytes_predicted": self.reference_bytes_predicted,
            "notes": list(self.notes),
            "steps": [asdict(step) for step in self.steps],
        }


def _describe(steps: Sequence[StepRecord]) -> str:
    """`c` a computed step, `p` one of a part of the batch, `r` one with kept references, `.` a skipped one."""
    pattern = "".join(_mark(step) for step in steps)
    skipped = pattern.count(".")
    reused = pattern.count("r")
    words = [f"{len(steps)} steps", f"{len(steps) - skipped} computed", f"{skipped} skipped"]
    if reused:
        words.append(f"{reused} with kept references")
    drifts = [step.drift for step in steps if step.drift is not None]
    if drifts:
        words.append(f"their keys had drifted by {', '.join(f'{drift:.1%}' for drift in drifts)}")
    return f"{', '.join(words)}, {sum(step.seconds for step in steps):.2f} s  [{pattern}]"


def _mark(step: StepRecord) -> str:
    if step.decision == "skipped":
        return "."
    if step.references == "reused":
        return "r"
    return "p" if step.rows_computed < step.rows else "c"
