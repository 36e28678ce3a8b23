"""A run as a page shows it: plain data, made by `RunFold` from events alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dittocache.jobs.run_folder import State

StageState = Literal["waiting", "running", "finished", "reused", "failed", "stopped", "died"]


@dataclass(frozen=True)
class StageView:
    """One stage of the run that was started last.

    Attributes:
        name: `validate`, `cache_latents`, ...
        title: what it does, in the user's words.
        state: `reused` where everything was cached, so that nothing had to be started.
        started, updated: seconds since the epoch, of its first and its last event; None while it waits.
        seconds: it took, once it has ended.
        done, total: items; both 0 where the stage counts none.
        speed: items a second.
        eta: seconds still to go, as of `updated`.
        written_bytes: by this stage so far, where it says so.
        outcome: what it found or made, in a few words each.
    """

    name: str
    title: str
    state: StageState = "waiting"
    started: float | None = None
    updated: float | None = None
    seconds: float | None = None
    done: float = 0
    total: float = 0
    speed: float = 0.0
    eta: float = 0.0
    written_bytes: float = 0
    outcome: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """How much of it is done, from 0 to 1."""
        if self.state in ("finished", "reused"):
            return 1.0
        return min(1.0, self.done / self.total) if self.total else 0.0


@dataclass(frozen=True)
class MemoryView:
    """Memory of one device while a stage runs: `used` of `total` bytes, and the most that this run was seen to use."""

    device: str
    used: float
    total: float
    most: float


@dataclass(frozen=True)
class MessageView:
    """One line of the run's messages; `level` is info, warning or error, `time` in seconds since the epoch."""

    time: float
    stage: str
    level: str
    text: str


@dataclass(frozen=True)
class SampleView:
    """A picture that the run has made.

    Attributes:
        picture: path within the run folder.
        caption: its prompt.
        source: path of the first reference picture; empty where there is none.
        target: path of the picture that it should become, where the data set has it; else empty.
        step: of the training it was made in; None for pictures of the generate stage.
        label: `base`, `lora`, or the name of the cache that it was made with; empty for pictures of the training.
        seconds: it took, where it was timed.
    """

    picture: str
    caption: str = ""
    source: str = ""
    target: str = ""
    step: int | None = None
    label: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class FailureView:
    """Why a run failed or died.

    Attributes:
        error: what went wrong.
        hint: how to mend it, where the cause is known; else empty.
        returncode: of the stage's process, negative for the signal that ended it; None where nobody saw its end.
        log_tail: last lines of the run's log; empty where the error says it all.
    """

    stage: str
    error: str
    hint: str = ""
    returncode: int | None = None
    log_tail: str = ""


@dataclass(frozen=True)
class RunView:
    """A run, complete: the same events and the same living processes give the same view in every tab.

    Attributes:
        state: as in `RunStatus`.
        detail: why it failed or died, else empty.
        stop_requests: how often the run that is at work was asked to stop; 1 finishes the step, 2 ends at once.
        typed: what the user typed to start it; empty where a page did.
        started, updated: seconds since the epoch, of the first and the last event of the run that was started last.
        losses: (step, loss) in the order of steps, over interruptions; beyond 2,000 points, means of neighbours.
        metrics: the last step's numbers: `step`, `loss`, `learning_rate`, `seconds`, `grad_norm`, `epoch`, ...
        results: stage -> what it found, as in its `result` events; empty mappings are left out.
        messages: the last 500.
    """

    state: State = "new"
    detail: str = ""
    stop_requests: int = 0
    typed: str = ""
    started: float | None = None
    updated: float | None = None
    stages: tuple[StageView, ...] = ()
    losses: tuple[tuple[int, float], ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    memory: tuple[MemoryView, ...] = ()
    messages: tuple[MessageView, ...] = ()
    samples: tuple[SampleView, ...] = ()
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: FailureView | None = None

    @property
    def stage(self) -> StageView | None:
        """The stage at work, else the one that began last; None before any has."""
        begun = [stage for stage in self.stages if stage.state != "waiting"]
        return next((stage for stage in begun if stage.state == "running"), begun[-1] if begun else None)
