"""The tuning stage: the fastest setting that keeps to a target on this model, as a profile and a piece of YAML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import yaml
from PIL import Image

from dittocache.errors import ReferenceCacheError, StepCacheError
from dittocache.events import EventLog, Progress
from dittocache.families.denoiser import find_denoiser
from dittocache.families.registry import adapter_of
from dittocache.jobs.calibration import record
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.run_folder import PROFILE_NAME, TUNING_NAME
from dittocache.jobs.tuning_requests import Request, load_pipeline, plain_picture, requests_of, run_print, save_profile
from dittocache.quality.calibration.fitting import calibrated
from dittocache.quality.calibration.recording import Recording, Subject
from dittocache.quality.metrics_lpips import lpips
from dittocache.quality.tuning.curve import Point, plot_curve, table
from dittocache.quality.tuning.measurement import Ledger
from dittocache.quality.tuning.pareto import pareto
from dittocache.quality.tuning.settings import PLAIN, Method, References, Setting, all_methods
from dittocache.quality.tuning.target import Target
from dittocache.quality.tuning.tune import TIMED, Tuned
from dittocache.quality.tuning.tune import tune as search_settings
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.hook import apply_reference_kv, remove_reference_kv
from dittocache.sampling.session import without_remarks
from dittocache.teacache.fingerprint import fingerprint, json_digest
from dittocache.teacache.profile import Calibration, RunPrint, known_profile, profiles_folder

FOLDER = "tuning"
SETTINGS_NAME = "teacache.yaml"


def tune(inputs: RunInputs, log: EventLog) -> None:
    """Search settings on the run's samples, verify the choice on others, save it.

    Writes `RUN/profile.json`, `RUN/teacache.yaml` (the settings, for the run's own file), `RUN/tuning/` with everything
    that was measured and a plot, and the profile that `teacache.profile: auto` finds. A run that was stopped goes on
    with what it had measured. Emits a `result`.
    """
    options = inputs.config.tune
    pipe = load_pipeline(inputs)
    samples, held_out = requests_of(inputs, pipe, options.samples, options.held_out_samples)
    run, calibration, knows_blocks = _calibration(inputs, pipe, samples, log)
    methods = all_methods(run.steps, calibration, knows_blocks, _references(pipe, [*samples, *held_out]))
    if len(methods) == 1:
        log.message(f"{run.steps} steps are too few for a step cache: only fewer plain steps are tried", "warning")
    model = fingerprint(find_denoiser(pipe))
    progress = Progress(log, expected_pictures(methods, len(samples), len(held_out)))
    ledger = Ledger(
        inputs.run_dir / FOLDER / json_digest([model.model_dump(mode="json"), run.model_dump(mode="json")]),
        progress.advance,
        None if options.lpips_weights is None else partial(_perceptual, options.lpips_weights),
    )
    target = Target.parse(options.target)
    with without_remarks():  # that a mild setting skips nothing is part of the search
        found = search_settings(target, options.promise, methods, samples, held_out, ledger)
    recommended, remark = recommendation(found, run)
    profile = save_profile(inputs, pipe, run, dict(calibration), recommended, remark)
    fragment = {"teacache": recommended, **_reference_settings(found)}
    if found.best is not None and found.best.setting.steps is not None:
        fragment = {"generate": {"num_inference_steps": found.best.setting.steps}}
    (inputs.run_dir / SETTINGS_NAME).write_text(f"# {found.words}\n{yaml.safe_dump(fragment, sort_keys=False)}")
    shown = pareto(found.measured)
    plot = plot_curve(inputs.run_dir / FOLDER / "pareto.png", found.measured)
    log.message(f"{len(samples)} tuning pictures; passes and wall are speed-ups, wall of the whole call:")
    log.message(table(shown))
    log.message(f"{len(found.measured)} settings measured; plot: {plot}")
    if recommended is not None:
        log.message(
            f"use it: --teacache.profile auto (or {inputs.run_dir / PROFILE_NAME}); {SETTINGS_NAME} has it in words"
        )
    log.emit(
        "result",
        target=str(target),
        promise=options.promise,
        curve=[_row(point) for point in shown],
        settings=recommended,
        **_reference_settings(found),
        profile=str(profiles_folder() / profile.file_name),
        words=found.words,
    )
    summary = {"words": found.words, "curve": [_row(point) for point in found.measured], "settings": recommended}
    summary |= _reference_settings(found)
    (inputs.run_dir / TUNING_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def expected_pictures(methods: list[Method], samples: int, held_out: int) -> int:
    """About how many pictures the search looks at: bisection halves each sweep."""
    looks = sum(len(method.settings).bit_length() for method in methods)
    return (2 * looks * samples) + 2 * (held_out + TIMED)  # each setting once more for the curve


def recommendation(found: Tuned, run: RunPrint) -> tuple[dict[str, Any] | None, str]:
    """Settings of the step cache that differ from the defaults, and what their user should know."""
    if found.cache is None:
        if found.best is None:
            return None, f"tune found no setting that keeps to {found.target}"
        return None, f"tune found no step cache that keeps to {found.target}; {found.best.setting.knob} do, without one"
    if found.cache.setting.teacache is None:
        return None, f"tune found that at {found.target} keeping references alone is best: {found.cache.setting.knob}"
    settings = found.cache.setting.teacache.model_dump(mode="json", exclude_defaults=True)
    if found.best is not None and found.best.setting.method == PLAIN:
        return settings, f"tune found that {found.best.setting.knob} without a step cache beat it at {found.target}"
    return settings, ""


def _reference_settings(found: Tuned) -> dict[str, Any]:
    """Settings of the reference cache, where the best cache has one; they belong to no profile."""
    kept = None if found.cache is None else found.cache.setting.reference_kv
    return {} if kept is None else {"reference_kv": kept.model_dump(mode="json", exclude_defaults=True)}


def _references(pipe: Any, requests: Sequence[Request]) -> References | None:
    """What becomes of kept references; None where a picture has none, or the model's cannot be kept."""
    if not all(request.edit.images for request in requests):
        return None
    try:
        apply_reference_kv(pipe, ReferenceKVConfig())
    except ReferenceCacheError:
        return None
    remove_reference_kv(pipe)
    module = find_denoiser(pipe).module
    return "exact" if adapter_of(module).reference_is_exact(module) else "drift"


def _calibration(
    inputs: RunInputs, pipe: Any, samples: list[Request], log: EventLog
) -> tuple[RunPrint, dict[Subject, Calibration], bool]:
    """(kind of run, calibration of the distance gate, whether the model's blocks are known).

    That of the profile, where there is one for these very runs, else one of the first samples.
    """
    try:
        recording, run = record(inputs, samples[:1], None)
    except StepCacheError as error:
        log.message(f"the distance gate is left out: {error}", level="warning")
        size = plain_picture(samples[0]).image.size
        return run_print(inputs, pipe, Recording(), size), {}, False
    known = known_profile(fingerprint(find_denoiser(pipe)), run)
    if known is not None and known.calibration:
        return run, dict(known.calibration), True
    points = recording.points
    if more := samples[1 : inputs.config.calibrate.samples]:
        points = [*points, *record(inputs, more, None)[0].points]
    return run, calibrated(points, (), inputs.config.calibrate.degree) if points else {}, True


def _perceptual(weights: Any, first: Image.Image, second: Image.Image) -> float:
    return lpips(first, second, weights)


def _row(point: Point) -> dict[str, Any]:
    setting: Setting = point.setting
    caches = {
        name: None if cache is None else cache.model_dump(mode="json", exclude_defaults=True)
        for name, cache in (("teacache", setting.teacache), ("reference_kv", setting.reference_kv))
    }
    numbers = {name: value for name, value in asdict(point).items() if name != "setting"}
    return {"setting": setting.label, "method": setting.method, "steps": setting.steps, **caches, **numbers}
