"""What page *Generate* asks for, kept on disk while it is edited, and the settings of the job that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dittocache.config import RunConfig, check_config, load_config
from dittocache.data.pictures import ENDINGS
from dittocache.errors import ConfigError, DittocacheError
from dittocache.jobs.run_folder import CONFIG_NAME, EVENTS_NAME, LORA_NAME
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.studio.draft import Draft
from dittocache.studio.state import Studio
from dittocache.studio.training import outside_problems
from dittocache.teacache.config import TeaCacheConfig

STAGES = ("picture",)
PICTURES_NAME = "pictures"  # folder in that of the runs: one folder a picture, so that runs keep their own
REQUEST_NAME = "generate.json"
NO_DATA_NAME = "no-data-set"  # below the Studio's home, where there is none
DRAFT_SOURCE = ""  # stands for the settings of the other pages, where a run's name would

CACHES = {
    "off": "No cache",
    "cached": "With caches",
    "both": "Side by side",
}
"""Choices of `caches`: what is made, in the user's words."""

GATES = {
    "error": "by the measured error (needs no calibration)",
    "distance": "by the distance of inputs (TeaCache as published)",
}
"""Gates of the step cache that have one dial."""

DIALS = {"error": "error_tolerance", "distance": "rel_l1_thresh"}
"""The setting that a gate is turned by."""


@dataclass(frozen=True)
class Source:
    """A model to make pictures with.

    Attributes:
        run: name of the run whose settings and LoRA are used; empty for the settings of the other pages.
        title: in the user's words.
        lora: whether there is one.
    """

    run: str
    title: str
    lora: bool


def request_of(studio: Studio) -> Draft:
    """What the page asks for: `source`, `caches`, `gate`, `use_lora`, and settings by dotted name."""
    return Draft(studio.home / REQUEST_NAME)


def sources(studio: Studio) -> list[Source]:
    """The newest run first, then the settings of the other pages."""
    try:
        folders = [file.parent for file in studio.runs_dir.glob(f"*/{CONFIG_NAME}")]
    except (OSError, DittocacheError):
        folders = []
    folders.sort(key=_changed, reverse=True)
    runs = [Source(folder.name, _title(folder), (folder / LORA_NAME).is_dir()) for folder in folders]
    runs.sort(key=lambda source: not source.lora)  # what was trained is what one wants to see
    return [*runs, Source(DRAFT_SOURCE, "the model of page Model, without a LoRA", False)]


def chosen_source(studio: Studio, given: Mapping[str, Any]) -> Source:
    """The source that was chosen, else the first of them."""
    found = sources(studio)
    return next((source for source in found if source.run == given.get("source")), found[0])


def source_config(studio: Studio, source: Source) -> RunConfig:
    """Settings of a source; raises ConfigError where they are incomplete or cannot be read."""
    if source.run == DRAFT_SOURCE:  # which may know no data set yet: none is needed here
        has_data = any(name in studio.draft.given for name in ("data.path", "data.sets"))
        return studio.config() if has_data else studio.config({"data.sets": []})
    return load_config(studio.path(studio.runs_dir / source.run) / CONFIG_NAME)


def cache_settings(given: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The caches that were chosen, as sections of settings; what was not touched is as in the source's settings."""
    if given.get("caches", "both") == "off":
        return {"teacache": None, "reference_kv": None}
    step_cache = (config.teacache or TeaCacheConfig(gate="error")).model_dump(mode="json")
    gate = given.get("gate", step_cache["gate"])
    if gate != step_cache["gate"]:
        step_cache = {"gate": gate}  # other dials were meant for the other gate
    dial = DIALS.get(str(gate))
    if dial is not None and given.get(dial) is not None:
        step_cache[dial] = given[dial]
    reference = (config.reference_kv or ReferenceKVConfig()).model_dump(mode="json")
    if "refresh" in given:
        reference["refresh"] = given["refresh"] or None
    return {
        "teacache": step_cache if given.get("step_cache", True) else None,
        "reference_kv": reference if given.get("reference_cache", True) and _images(given) else None,
    }


def requested_config(studio: Studio, given: Mapping[str, Any]) -> RunConfig:
    """Settings of the job that makes the picture; raises ConfigError listing every problem, AccessError for a path."""
    source = chosen_source(studio, given)
    config = source_config(studio, source)
    settings = {name: value for name, value in given.items() if name.startswith("generate.")}
    settings["generate.image"] = [str(studio.path(image)) for image in _images(given)]
    settings["generate.side_by_side"] = given.get("caches", "both") != "cached"
    lora = studio.runs_dir / source.run / LORA_NAME
    settings["generate.lora"] = str(lora) if source.lora and given.get("use_lora", True) else None
    problems = _problems(given)
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) with the picture", problems)
    folder = studio.path(studio.runs_dir / PICTURES_NAME)
    settings |= {"output_dir": str(folder), "name": _new_name(folder), "held_out": None}
    content = {**config.model_dump(mode="json"), **cache_settings(given, config)}
    if not has_open_data(studio, config):  # it would only say to what size training brought references
        content["data"] = config.data.held_out(studio.home / NO_DATA_NAME).model_dump(mode="json")
    checked = check_config(content, settings)
    outside = outside_problems(studio, checked)
    if outside:
        raise ConfigError(f"{len(outside)} path(s) are outside the Studio's folders", outside)
    return checked


def has_open_data(studio: Studio, config: RunConfig) -> bool:
    """Whether the data sets of these settings, the one held out too, are inside the allowed folders."""
    held_out = [] if config.held_out is None else [config.held_out]
    return all(studio.roots.holds(studio.base / path) for path in (*config.data.paths, *held_out))


def made_pictures(studio: Studio, most: int = 24) -> list[Path]:
    """Folders of the pictures that were asked for here, the newest first."""
    try:
        folder = studio.path(studio.runs_dir / PICTURES_NAME)
        found = [file.parent for file in folder.glob(f"*/{EVENTS_NAME}")]
    except (OSError, DittocacheError):
        return []
    return sorted(found, reverse=True)[:most]


def _problems(given: Mapping[str, Any]) -> list[str]:
    problems = []
    if not str(given.get("generate.prompt") or "").strip():
        problems.append("the prompt is empty: say what to do with the picture, or what to make")
    for image in _images(given):
        if not Path(image).is_file() or Path(image).suffix.lower() not in ENDINGS:
            problems.append(f"there is no picture {image} any more: take it away, or choose another")
    caches_on = given.get("caches", "both") != "off"
    reference_cache = given.get("reference_cache", True) and bool(_images(given))
    if caches_on and not given.get("step_cache", True) and not reference_cache:
        problems.append("no cache is switched on: switch one on, or choose 'No cache'")
    return problems


def _images(given: Mapping[str, Any]) -> list[str]:
    images = given.get("generate.image")
    return [str(image) for image in images] if isinstance(images, list) else []


def _new_name(folder: Path) -> str:
    """A name by the time, so that the names' order is that of the pictures."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    number, name = 1, now
    while (folder / name).exists():
        number += 1
        name = f"{now}-{number:02d}"
    return name


def _title(folder: Path) -> str:
    return f"{folder.name}, with its LoRA" if (folder / LORA_NAME).is_dir() else f"{folder.name}, which has no LoRA yet"


def _changed(folder: Path) -> float:
    try:
        return (folder / EVENTS_NAME).stat().st_mtime
    except OSError:
        return 0.0
