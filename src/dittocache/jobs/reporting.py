"""The report stage: gathers what the other stages found and has it laid out as one page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.errors import StageError
from dittocache.events import Event, EventLog, number_in, read_events
from dittocache.families.pictures import open_picture
from dittocache.jobs.generation import fitted
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.run_folder import EVENTS_NAME, REPORT_NAME, TUNING_NAME, WORKFLOW
from dittocache.quality.machine import describe_machine
from dittocache.quality.report import write_report
from dittocache.quality.report_caches import CachesSection, ComparedEdit, SkipPattern, Variant
from dittocache.quality.report_data import (
    BeforeAfterSection,
    CachedArtifact,
    CachedSection,
    HeldOutEdit,
    LossSection,
    Report,
    SamplePair,
    SamplesSection,
    TrainingSpeed,
    TrainingSpeedSection,
)
from dittocache.quality.report_json import report_as_dict
from dittocache.quality.report_tuning import TuningPoint, TuningSection

SHOWN_SAMPLES = 6

Section = TypeVar("Section")


def report(inputs: RunInputs, log: EventLog) -> None:
    """Write `RUN/report.html`, and its numbers to `RUN/report.json`, from what has run so far.

    Raises StageError when nothing has run yet.
    """
    events = list(read_events(inputs.run_dir / EVENTS_NAME))
    found = Findings.gathered(events)
    if not found.results:
        raise StageError(f"{inputs.run_dir} holds no results to report; run `dittocache train` or `generate` first")
    page = Report(
        title=f"dittocache: {inputs.config.name}",
        date=datetime.now().astimezone(),
        command=found.command,
        machine=describe_machine(),
        samples=_samples(inputs),
        cached=_if_whole(log, "what was cached", lambda: _cached(inputs, found)),
        training_speed=_if_whole(log, "training speed", lambda: _training_speed(found)),
        loss=_loss(found),
        before_after=_if_whole(log, "before and after", lambda: _before_after(inputs, found)),
        caches=_if_whole(log, "caches compared", lambda: _caches(inputs, found)),
        tuning=_if_whole(log, "the tuning", lambda: _tuning(inputs.run_dir / TUNING_NAME)),
    )
    path = write_report(page, inputs.run_dir / REPORT_NAME)
    numbers = json.dumps(report_as_dict(page), indent=1, allow_nan=False)
    path.with_suffix(".json").write_text(numbers, encoding="utf-8")
    log.emit("result", report=str(path), words=str(path))


def _if_whole(log: EventLog, name: str, build: Callable[[], Section | None]) -> Section | None:
    """A section of the report; None, with a warning, where the events or pictures that it shows are damaged or gone."""
    try:
        return build()
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        log.message(
            f"the report is without {name}: {type(error).__name__}: {error}; what the run told of it in "
            f"{EVENTS_NAME} is damaged, or a picture is gone",
            level="warning",
        )
        return None


class Findings:
    """What the latest run of each stage found.

    Attributes:
        results: stage -> the fields of its `result` events, later ones over earlier ones.
        losses: step -> loss of the training, over interruptions.
        command: what the user typed last.
    """

    def __init__(self) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self.losses: dict[int, float] = {}
        self.command = ""

    @classmethod
    def gathered(cls, events: Iterable[Event]) -> Findings:
        """Read the whole stream of a run folder, which may hold several runs one after the other."""
        found = cls()
        for event in events:
            stage, kind = event["stage"], event["kind"]
            if kind == "stage_started":
                if stage == WORKFLOW:
                    found.command = str(event.get("typed") or found.command)
                elif stage != "report":
                    found.results[stage] = {}
            elif kind == "result" and stage in found.results:
                found.results[stage] |= event
                if event.get("resumed_from") == 0:
                    found.losses.clear()
            elif kind == "metric" and stage == "train" and (loss := number_in(event, "loss")) is not None:
                found.losses[int(event["step"])] = loss
        return found

    def of(self, stage: str) -> Mapping[str, Any]:
        """The findings of a stage, empty where it never ran."""
        return self.results.get(stage, {})


def _samples(inputs: RunInputs) -> SamplesSection:
    pairs = [
        SamplePair(
            caption=sample.prompt,
            target=fitted(sample.target, sample.size),
            source=open_picture(sample.controls[0]) if sample.controls else None,
        )
        for sample in inputs.samples[:SHOWN_SAMPLES]
    ]
    return SamplesSection(tuple(pairs), total=len(inputs.samples))


def _cached(inputs: RunInputs, found: Findings) -> CachedSection | None:
    artifacts: Mapping[str, Mapping[str, Any]] = found.of("validate").get("artifacts", {})
    if not artifacts or not inputs.manifest_path.exists():
        return None
    keys: dict[str, set[str]] = {}
    for artifact_keys in Manifest.load(inputs.manifest_path).samples.values():
        for name, key in artifact_keys.items():
            keys.setdefault(name, set()).add(key)
    rows = []
    for name, row in artifacts.items():
        sizes = inputs.store.sizes(keys.get(name, ()))
        encoded = min(row["missing"], len(sizes))
        rows.append(
            CachedArtifact(
                name=name,
                encoder=row["encoder"] or "none",
                encoded=encoded,
                reused=len(sizes) - encoded,
                stored_bytes=sum(sizes.values()),
            )
        )
    seconds = sum(float(found.of(stage).get("seconds", 0.0)) for stage in ("cache_latents", "cache_text"))
    return CachedSection(tuple(rows), seconds=seconds or None)  # an earlier run's encoding was not timed here


def _training_speed(found: Findings) -> TrainingSpeedSection | None:
    measured = found.of("measure")
    if not measured:
        return None
    live, cached = (TrainingSpeed(label, **measured[label]) for label in ("live", "cached"))
    return TrainingSpeedSection(live, cached, note="median of the steps after a warm-up; same batches, noise and model")


def _loss(found: Findings) -> LossSection | None:
    if not found.losses:
        return None
    steps = sorted(found.losses)
    return LossSection(tuple(steps), tuple(found.losses[step] for step in steps))


def _before_after(inputs: RunInputs, found: Findings) -> BeforeAfterSection | None:
    generated = found.of("generate")
    if not generated.get("held_out"):
        return None
    edits = []
    for row in generated["edits"]:
        if row.get("lora") and row["target"]:
            lora = open_picture(inputs.run_dir / row["lora"])
            edits.append(
                HeldOutEdit(
                    caption=row["caption"],
                    source=_source(row, lora.size),
                    base=open_picture(inputs.run_dir / row["base"]),
                    lora=lora,
                    target=fitted(Path(row["target"]), lora.size),
                )
            )
    return BeforeAfterSection(tuple(edits)) if edits else None


def _caches(inputs: RunInputs, found: Findings) -> CachesSection | None:
    edits = []
    for row in found.of("generate").get("compared", ()):
        variants = tuple(_variant(variant, inputs.run_dir) for variant in row["variants"])
        edits.append(ComparedEdit(row["caption"], _source(row, variants[0].picture.size), variants))
    return CachesSection(tuple(edits)) if edits else None


def _variant(row: Mapping[str, Any], run_dir: Path) -> Variant:
    return Variant(
        label=row["label"],
        role=row["role"],
        picture=open_picture(run_dir / row["picture"]),
        seconds=row["seconds"],
        patterns=tuple(SkipPattern(branch, tuple(marks)) for branch, marks in row["patterns"].items()),
        settings=row["settings"],
        bytes_held=row["bytes_held"],
        notes=tuple(row.get("notes", ())),
    )


def _source(row: Mapping[str, Any], size: tuple[int, int]) -> Image.Image | None:
    return fitted(Path(row["source"]), size) if row["source"] else None


def _tuning(path: Path) -> TuningSection | None:
    """What `tune` has left; None where it never ran in this folder. Raises StageError for a damaged file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(_tuning_point(row, content["settings"]) for row in content["curve"])
        return TuningSection(points, content["words"]) if points else None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path} cannot be read ({error}); run `dittocache tune` again, or remove it") from error


def _tuning_point(row: Mapping[str, Any], recommended: Mapping[str, Any] | None) -> TuningPoint:
    numbers = ("speedup", "wall", "psnr", "psnr_worst", "ssim", "ssim_worst", "flip", "flip_worst")
    return TuningPoint(
        label=row["setting"],
        plain=row["teacache"] is None,
        chosen=recommended is not None and row["teacache"] == recommended and row["steps"] is None,
        **{name: float(row[name]) for name in numbers},
    )
