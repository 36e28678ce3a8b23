"""The calibrating stage: the step cache's polynomial for this model, with how far it can be trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dittocache.events import EventLog, Progress
from dittocache.families.denoiser import find_denoiser
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.run_folder import PROFILE_NAME
from dittocache.jobs.tuning_requests import (
    Request,
    load_pipeline,
    plain_picture,
    requests_of,
    run_print,
    save_profile,
)
from dittocache.quality.calibration.fitting import calibrated, remarks
from dittocache.quality.calibration.plot import plot_calibration
from dittocache.quality.calibration.recording import Point, Recording, recorded
from dittocache.teacache.fingerprint import fingerprint
from dittocache.teacache.profile import RunPrint, known_profile, profiles_folder

FOLDER = "calibration"


def calibrate(inputs: RunInputs, log: EventLog) -> None:
    """Fit the polynomial on the run's samples, check it on others, and save it as a profile.

    Writes `RUN/profile.json`, `RUN/calibration/` with every point and a plot, and the profile that
    `teacache.profile: auto` finds; what `tune` recommended for the same runs is kept. Emits a `result`.
    """
    settings = inputs.config.calibrate
    pipe = load_pipeline(inputs)
    samples, held_out = requests_of(inputs, pipe, settings.samples, settings.held_out_samples)
    progress = Progress(log, len(samples) + len(held_out))
    recording, run = record(inputs, samples, progress)
    check, _ = record(inputs, held_out, progress)
    found = calibrated(recording.points, check.points, settings.degree)
    known = known_profile(fingerprint(find_denoiser(pipe)), run)
    recommended, remark = (None, "") if known is None else (known.settings, known.remark)
    profile = save_profile(inputs, pipe, run, dict(found), recommended, remark)
    folder = inputs.run_dir / FOLDER
    plot = plot_calibration(folder / "calibration.png", recording.points, check.points, found)
    (folder / "points.json").write_text(_as_json(recording.points, check.points), encoding="utf-8")
    for subject, one in found.items():
        terms = ", ".join(f"{value:.6g}" for value in one.coefficients)
        lowest, highest = one.fitted_range
        log.message(f"{subject}: coefficients {terms} on distances {lowest:.4g} to {highest:.4g}")
    for doubt in remarks(found):
        log.message(doubt, level="warning")
    log.message(f"plot: {plot}")
    log.message(f"use it: --teacache.profile auto (or {inputs.run_dir / PROFILE_NAME})")
    fits = [f"{subject} R² {one.r2_fit:.2f}, held out {_number(one.r2_held_out)}" for subject, one in found.items()]
    log.emit(
        "result",
        calibration={subject: one.model_dump(mode="json") for subject, one in found.items()},
        profile=str(profiles_folder() / profile.file_name),
        words=f"{'; '.join(fits)} ({len(recording.points)} and {len(check.points)} steps)",
    )


def record(inputs: RunInputs, requests: Sequence[Request], progress: Progress | None) -> tuple[Recording, RunPrint]:
    """All points of the requests, and what kind of runs they are."""
    together, size = Recording(), (0, 0)
    for request in requests:
        with recorded(request.pipe) as found:
            size = plain_picture(request).image.size
        together.points += found.points
        together.tokens, together.branches = found.tokens, together.branches | found.branches
        if progress is not None:
            progress.advance()
    return together, run_print(inputs, requests[0].pipe, together, size)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _as_json(points: Sequence[Point], held_out: Sequence[Point]) -> str:
    rows: dict[str, list[Any]] = {
        "fitted": [asdict(point) for point in points],
        "held_out": [asdict(point) for point in held_out],
    }
    return json.dumps(rows, indent=1) + "\n"
