"""From events to what a page shows: a pure function of the events, computed bit by bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dittocache.events import Event, number_in
from dittocache.jobs.following.losses import LossCurve
from dittocache.jobs.following.samples import samples_of
from dittocache.jobs.following.view import (
    FailureView,
    MemoryView,
    MessageView,
    RunView,
    SampleView,
    StageState,
    StageView,
)
from dittocache.jobs.results import describe_result
from dittocache.jobs.run_folder import WORKFLOW, Ends
from dittocache.jobs.stages import STAGES

MOST_MESSAGES = 500


def view_of(events: Iterable[Event], live: bool) -> RunView:
    """What a page shows of a run with these events; `live` says whether a process works in its folder."""
    fold = RunFold()
    for event in events:
        fold.add(event)
    return fold.view(live)


class RunFold:
    """Takes the events of a run folder in order; `view` says at any time what they come to."""

    def __init__(self) -> None:
        self._ends = Ends()
        self._stages: dict[str, StageView] = {}
        self._losses = LossCurve()
        self._metrics: dict[str, float] = {}
        self._memory: dict[str, MemoryView] = {}
        self._messages: deque[MessageView] = deque(maxlen=MOST_MESSAGES)
        self._samples: dict[str, SampleView] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._typed = ""
        self._started: float | None = None
        self._updated: float | None = None
        self._stop_requests = 0

    def add(self, event: Event) -> None:
        """Take one event, as `parse_event` gives it."""
        self._ends.add(event)
        self._updated = event["time"]
        if event["kind"] == "message":
            self._add_message(event)
        if event["stage"] == WORKFLOW:
            if event["kind"] == "stage_started":
                self._begin(event)
            return
        match event["kind"]:
            case "stage_started":
                self._start(event)
            case "progress":
                self._advance(event)
            case "metric":
                self._measure(event)
            case "memory":
                self._remember(event)
            case "result":
                self._find(event)
            case "stage_finished" | "stage_failed":
                self._end(event)

    def view(self, live: bool) -> RunView:
        """The run as it stands; `live` says whether a process works in its folder."""
        status = self._ends.status(live)
        failed, failure = self._ends.failed, None
        if status.state == "failed" and failed is not None:
            failure = FailureView(failed["stage"], failed["error"], failed["hint"], failed["returncode"])
        elif status.state == "died":
            failure = FailureView(status.stage, status.detail)
        stages = list(self._stages.values())
        if not live:
            stages = [replace(one, state="died") if one.state == "running" else one for one in stages]
        return RunView(
            state=status.state,
            detail=status.detail,
            stop_requests=self._stop_requests if live else 0,
            typed=self._typed,
            started=self._started,
            updated=self._updated,
            stages=tuple(stages),
            losses=self._losses.points(),
            metrics=dict(self._metrics),
            memory=tuple(self._memory.values()) if live else (),
            messages=tuple(self._messages),
            samples=tuple(self._samples.values()),
            results={stage: dict(found) for stage, found in self._results.items() if found},
            failure=failure,
        )

    def _begin(self, event: Event) -> None:
        """A workflow begins: its stages stand in line."""
        names = [name for name in event["command"] if name in STAGES]
        self._stages = {name: StageView(name, STAGES[name].title) for name in names}
        self._typed = str(event.get("typed", ""))
        self._started = event["time"]
        self._stop_requests = 0
        self._memory = {}

    def _start(self, event: Event) -> None:
        name = event["stage"]
        title = STAGES[name].title if name in STAGES else name
        self._stages[name] = StageView(name, title, "running", event["time"], event["time"])
        self._results[name] = {}
        self._memory = {}
        if name == "train":
            self._metrics = {}
        if name == "generate":
            self._samples = {path: one for path, one in self._samples.items() if one.step is not None}

    def _advance(self, event: Event) -> None:
        stage = self._stages.get(event["stage"])
        if stage is None:
            return
        self._stages[stage.name] = replace(
            stage,
            updated=event["time"],
            done=event["done"],
            total=event["total"],
            speed=event["speed"],
            eta=event["eta"],
            written_bytes=number_in(event, "bytes") or stage.written_bytes,
        )

    def _measure(self, event: Event) -> None:
        numbers = {name: number_in(event, name) for name in event if name != "time"}
        self._metrics = {name: value for name, value in numbers.items() if value is not None}
        if "loss" in self._metrics and event["stage"] == "train":
            self._losses.add(int(event["step"]), self._metrics["loss"])

    def _remember(self, event: Event) -> None:
        device = event["device"]
        former = self._memory.get(device)
        most = max(event["used"], former.most if former is not None else 0)
        self._memory[device] = MemoryView(device, event["used"], event["total"], most)

    def _find(self, event: Event) -> None:
        name = event["stage"]
        found = {field: value for field, value in event.items() if field not in ("time", "stage", "kind")}
        self._results.setdefault(name, {}).update(found)
        stage = self._stages.get(name)
        if stage is not None:
            words = (*stage.outcome, *describe_result(event))
            self._stages[name] = replace(stage, updated=event["time"], outcome=words)
        resumed_from = number_in(event, "resumed_from")
        if name == "train" and resumed_from is not None:
            self._losses.cut(int(resumed_from))
            kept = {path: one for path, one in self._samples.items() if one.step is None or one.step <= resumed_from}
            self._samples = kept
        for sample in samples_of(event):
            self._samples[sample.picture] = sample

    def _end(self, event: Event) -> None:
        stage = self._stages.get(event["stage"])
        if stage is None:
            return
        state: StageState = "finished"
        if event["kind"] == "stage_failed":
            state = "stopped" if event.get("stopped") else "failed"
        elif self._ends.was_reused(stage.name):
            state = "reused"
        began = stage.started if stage.started is not None else event["time"]
        seconds = event["seconds"] if event["kind"] == "stage_finished" else max(0.0, event["time"] - began)
        self._stages[stage.name] = replace(stage, state=state, updated=event["time"], seconds=seconds)

    def _add_message(self, event: Event) -> None:
        self._messages.append(MessageView(event["time"], event["stage"], event["level"], event["text"]))
        requests = number_in(event, "stop_requests")
        if event["stage"] == WORKFLOW and requests is not None:
            self._stop_requests = int(requests)
