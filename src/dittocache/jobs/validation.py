"""The first stage: every check that needs no model in memory, all problems listed at once."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dittocache.config import BUNDLED
from dittocache.data.loading import notes_of
from dittocache.data.sample import Sample
from dittocache.embeddings.planning.identity import model_folder
from dittocache.embeddings.planning.plan import Plan
from dittocache.errors import ConfigError, DataError, DittocacheError, listed_in
from dittocache.events import EventLog
from dittocache.families.loading import component_names
from dittocache.jobs.inputs import RunInputs, latent_encoders, records_of, save_manifest, text_encoders
from dittocache.training.requirements import requirement_problems, visibility_problems

FREE_BYTES = 200_000_000  # below it not even a small data set and a LoRA are sure to fit
BUNDLED_RESOLUTION = 256  # the bundled model was trained at 128; far above it, pictures turn to noise
WITH_WEIGHTS = ("transformer", "vae", "text_encoder", "image_encoder")  # how the names of such components begin


def validate(inputs: RunInputs, log: EventLog) -> None:
    """Check settings, model, data sets, folders and disk; say what is cached and what is still to encode.

    Raises ConfigError that lists every problem.
    """
    problems: list[str] = []
    _check_devices(inputs, problems)
    if _can(lambda: inputs.device):
        problems.extend(requirement_problems(inputs.config.train, inputs.device))
    with listed_in(problems):
        log.message(f"model {inputs.model} is a {inputs.family.name}")
    _check_bundled(inputs, problems)
    family_known = _can(lambda: inputs.family)
    if family_known or inputs.config.model.family is not None:  # else the line above says already that there is none
        with listed_in(problems):
            problems.extend(model_problems(inputs.model))
    if family_known:
        _check_data(inputs, problems)
    for field, folder in (("output_dir", inputs.config.output_dir), ("cache.cache_dir", inputs.config.cache.folder)):
        problems.extend(folder_problems(field, folder) if folder is not None else [])
    for number, picture in enumerate(inputs.config.generate.image):
        if not picture.is_file():
            problems.append(f"generate.image.{number}: there is no file {picture}")
    problems = list(dict.fromkeys(problems))
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) found before anything was loaded", problems)
    log.emit("result", samples=len(inputs.samples), held_out=len(inputs.held_out), family=inputs.family.name)
    plan = inputs.plan() if inputs.config.cache.use_cache else None
    for note in dict.fromkeys((*notes_of(inputs.samples), *notes_of(inputs.held_out))):
        if plan is None or note not in plan.notes:  # the plan tells its own
            log.message(note, level="warning")
    if plan is not None:
        _report_plan(inputs, plan, log)


def _report_plan(inputs: RunInputs, plan: Plan, log: EventLog) -> None:
    """Say what is cached; `cached` names the stages that have nothing to do, with the records that they find."""
    log.message(plan.describe())
    need = needed_bytes(plan)
    folder = inputs.config.cache.folder
    free = shutil.disk_usage(_existing(folder)).free if folder is not None else need
    if need > free:
        raise ConfigError(
            f"cache.cache_dir: about {need / 1e9:.1f} GB are needed for {plan.misses} records, {free / 1e9:.1f} GB are "
            f"free on the disk of {inputs.config.cache.cache_dir}; free space or choose another folder"
        )
    cached = {}
    for stage, encoders in (
        ("cache_latents", latent_encoders(inputs.family)),
        ("cache_text", text_encoders(inputs.family)),
    ):
        if inputs.config.cache.skips_existing(encoders[0]) and not any(plan.missing(encoder) for encoder in encoders):
            cached[stage] = len(records_of(plan, encoders))
    if plan.misses == 0:
        save_manifest(inputs, plan.manifest, log)
    # Without the list of stale records: an event is one line, and a data set may have a million.
    numbers = {name: value for name, value in plan.as_dict().items() if name != "stale"}
    log.emit("result", plan=numbers, cached=cached, artifacts=_artifacts(plan))


def _artifacts(plan: Plan) -> dict[str, dict[str, Any]]:
    """For each artifact its encoder, how many records the data set needs of it, and how many of them are missing."""
    keys: dict[str, set[str]] = {}
    encoders: dict[str, str | None] = {}
    for encoder, needs in plan.needs.items():
        for need in needs:
            for name, key in need.keys.items():
                keys.setdefault(name, set()).add(key)
                encoders[name] = encoder
    return {
        name: {"encoder": encoders[name], "records": len(found), "missing": len(found - plan.stored.keys())}
        for name, found in keys.items()
    }


def needed_bytes(plan: Plan) -> int:
    """About how many bytes the missing records will take.

    As the family estimates it; where it cannot, as many each as the stored ones take; 0 when none is stored.
    """
    if plan.bytes_to_write is not None:
        return plan.bytes_to_write.total
    return plan.bytes_stored // plan.hits * plan.misses if plan.hits else 0


def model_problems(model: str) -> list[str]:
    """Components that the checkpoint lists and does not hold, or not whole; raises ModelError without a checkpoint.

    Of weights the headers are read, which say how long each file must be.
    """
    folder = model_folder(model)
    problems = []
    for name in component_names(folder):
        files = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        if not files:
            problems.append(f"model.path: {folder} lists the component {name!r}, but its folder is missing or empty")
        elif name.startswith(WITH_WEIGHTS):
            problems.extend(f"model.path: {problem}" for problem in _weight_problems(folder / name, files))
    return problems


def _weight_problems(folder: Path, files: Sequence[Path]) -> list[str]:
    """What keeps the weights in a component's folder from being loaded."""
    names = [file.name for file in files]
    if "config.json" not in names:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return [f"{folder} holds {some} and no config.json; expected a component of a diffusers checkpoint"]
    if not any(file.suffix in (".safetensors", ".bin") for file in files):
        return [f"{folder} holds no weights; download the checkpoint again"]
    problems = []
    for file in files:
        try:
            if file.name == "config.json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
        except (ValueError, OSError, SafetensorError) as error:
            problems.append(f"{file} cannot be read ({error}); it is no such file, or cut short: download it again")
    return problems


def folder_problems(field: str, folder: Path) -> list[str]:
    """Why files cannot be written to `folder`, which need not exist yet; empty when they can."""
    if folder.exists() and not folder.is_dir():
        return [f"{field}: {folder} is a file; give the path of a folder"]
    parent = _existing(folder)
    if not parent.is_dir():
        return [f"{field}: {folder} cannot be made, because {parent} is a file"]
    try:
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free
    except OSError as error:
        return [f"{field}: {parent} cannot be written ({os.strerror(error.errno) if error.errno else error})"]
    if free < FREE_BYTES:
        return [f"{field}: only {free / 1e6:.0f} MB are free on the disk of {folder}; free at least 200 MB"]
    return []


def _check_devices(inputs: RunInputs, problems: list[str]) -> None:
    with listed_in(problems):
        _ = inputs.device
    for encoder in inputs.config.cache.devices:
        with listed_in(problems):
            inputs.encoder_device(encoder)


def _check_bundled(inputs: RunInputs, problems: list[str]) -> None:
    data = inputs.config.data
    if inputs.config.model.path == BUNDLED and data.side > BUNDLED_RESOLUTION:
        problems.append(
            f"data.resolution: found {data.side}; the bundled model was trained on pictures of 128 pixels a "
            "side: set data.resolution to 128 and data.condition_resolution to 64"
        )


def _check_data(inputs: RunInputs, problems: list[str]) -> None:
    sets: dict[str, Callable[[], Sequence[Sample]]] = {
        "data.path": lambda: inputs.samples,
        "held_out": lambda: inputs.held_out,
    }
    for field, read in sets.items():
        samples: Sequence[Sample] = []
        with listed_in(problems, f"{field}: "):
            samples = read()
            if field == "data.path" and not samples and not inputs.config.data.paths:
                raise DataError("found no data set; give a folder of pictures and captions, or a table of them")
        problems.extend(visibility_problems(inputs.config.train, inputs.family.name, samples))
        problems.extend(f"{field}: {problem}" for problem in _unfit(samples, inputs))


def _unfit(samples: Sequence[Sample], inputs: RunInputs) -> list[str]:
    """What the family cannot use: a line for all samples of which the same is to be said, with all their names."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for sample in samples:
        found: list[str] = []
        with listed_in(found):
            inputs.family.artifacts(sample, inputs.sizes)
        for problem in found:
            alike.setdefault(problem.replace(repr(sample.name), ""), []).append((sample.name, problem))
    lines = []
    for (_, first), *others in alike.values():
        names = ", ".join(repr(name) for name, _ in others)
        which = f"all {len(samples)} samples" if len(others) + 1 == len(samples) else f"{len(others)} more: {names}"
        lines.append(f"{first}; the same holds for {which}" if others else first)
    return lines


def _can(look: Callable[[], Any]) -> bool:
    try:
        look()
    except DittocacheError:
        return False
    return True


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists() and folder.parent != folder:
        folder = folder.parent
    return folder
