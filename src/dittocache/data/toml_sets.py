"""Lists of data sets in TOML, as musubi-tuner writes them.

    [general]                          what holds for all sets that do not say otherwise
    resolution = [960, 544]            the frame whose area pictures get, or one side
    enable_bucket = true               false, the default as there: pictures are cut to the frame
    bucket_no_upscale = true
    caption_extension = ".txt"

    [[datasets]]
    image_directory = "targets"        pictures and captions; or image_jsonl_file = "set.jsonl"
    control_directory = "controls"     `x.png`, or `x_0.png`, `x_1.png`, ... for several
    control_resolution = [1024, 1024]  or no_resize_control = true
    num_repeats = 2

`[[datasets.subsets]]` inside a set are sets of their own, with what the set says, as kohya's scripts have them.
Folders that are not found from the working directory are looked for beside the TOML file.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dittocache.data.config import SetConfig, SetSettings
from dittocache.errors import DataError

Table = Mapping[str, Any]


@dataclass(frozen=True)
class SetSource:
    """One set, and how its folder is to be read.

    Attributes:
        flat: as in `folder_place`.
        notes: what the user should know besides.
    """

    config: SetConfig
    flat: bool = False
    notes: tuple[str, ...] = ()


def _resolution(value: Any) -> Any:
    """One side, or the frame that `[width, height]` is."""
    return [tuple(value)] if isinstance(value, list) else value


def _side(value: Any) -> Any:
    """One side, or that of the square with the area of `[width, height]`."""
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return round(math.sqrt(value[0] * value[1]))
    return value


def _same(value: Any) -> Any:
    return value


def _opposite(value: Any) -> Any:
    return not value if isinstance(value, bool) else value


SETTINGS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "resolution": ("resolution", _resolution),
    "enable_bucket": ("buckets", _same),
    "bucket_no_upscale": ("upscale", _opposite),
    "bucket_reso_steps": ("bucket_step", _same),
    "bucket_step": ("bucket_step", _same),
    "control_resolution": ("control_resolution", _side),
    "qwen_image_edit_control_resolution": ("control_resolution", _side),
    "no_resize_control": ("resize_controls", _opposite),
    "qwen_image_edit_no_resize_control": ("resize_controls", _opposite),
    "flux_kontext_no_resize_control": ("resize_controls", _opposite),
    "caption_extension": ("caption_extension", _same),
    "caption_prefix": ("caption_prefix", _same),
    "trigger_word": ("trigger_word", _same),
    "num_repeats": ("repeats", _same),
    "flip_aug": ("flip", _same),
    "flip": ("flip", _same),
}
"""What may stand in `[general]`, in sets and in subsets: the setting of ours, and what becomes of the value."""

PLACES = ("image_directory", "image_dir", "image_jsonl_file", "control_directory", "conditioning_data_dir")
"""What sets and subsets say besides; the second name of a pair is that of kohya's scripts."""

ELSEWHERE = {
    "batch_size": "batches have train.batch_size samples",
    "cache_directory": "what is encoded is kept in cache.cache_dir",
}
"""What is a setting of the whole run here, and which."""

VIDEOS = ("video_directory", "video_jsonl_file", "target_frames", "frame_extraction")


def read_toml_sets(path: Path, defaults: SetSettings, problems: list[str]) -> list[SetSource]:
    """The sets of a TOML file; what is wrong with them is added to `problems`.

    Args:
        defaults: settings of sets that neither they nor `[general]` give; their path does not count.

    Raises DataError where the file cannot be read at all.
    """
    content = _content(path)
    known = ("general", "datasets")
    problems += [f"{path}: {_unknown(name, known)}" for name in content if name not in known]
    general, datasets = content.get("general", {}), content.get("datasets", [])
    if not isinstance(general, dict):
        problems.append(f"{path}: general is {general!r}; expected a table [general] of settings")
        general = {}
    _check_names(f"{path}: general", general, (*SETTINGS, *ELSEWHERE), problems)
    if not isinstance(datasets, list) or not datasets or not all(isinstance(one, dict) for one in datasets):
        problems.append(f"{path}: there is no data set; expected at least one table [[datasets]]")
        datasets = []
    sources = []
    for number, dataset in enumerate(datasets, start=1):
        where = f"{path}: datasets {number}"
        subsets = dataset.get("subsets")
        if subsets is None:
            tables = {where: dataset}
        elif isinstance(subsets, list) and subsets and all(isinstance(one, dict) for one in subsets):
            shared = {name: value for name, value in dataset.items() if name != "subsets"}
            tables = {f"{where}, subset {n}": {**shared, **one} for n, one in enumerate(subsets, start=1)}
        else:
            problems.append(f"{where}: subsets is {subsets!r}; expected tables [[datasets.subsets]]")
            continue
        for place, table in tables.items():
            source = _source(path, place, general, table, defaults, problems)
            sources += [source] if source is not None else []
    return sources


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; set data.path to a list of data sets") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:  # its message ends in the line and column
        raise DataError(f"{path} is not valid TOML: {error}") from error


def _source(
    path: Path, where: str, general: Table, table: Table, defaults: SetSettings, problems: list[str]
) -> SetSource | None:
    """One set; None where it cannot be used."""
    before = len(problems)
    _check_names(where, table, (*SETTINGS, *ELSEWHERE, *PLACES, *VIDEOS), problems)
    folder, listing, controls = _places(path, where, table, problems)
    settings: dict[str, Any] = {**_defaults(defaults), "path": listing or folder, "control_path": controls}
    names = {}
    for level in (general, table):
        for name, value in level.items():
            if name in SETTINGS:
                setting, converted = SETTINGS[name]
                settings[setting], names[setting] = converted(value), name
    if len(problems) > before:
        return None
    try:
        config = SetConfig.model_validate(settings)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            name = names.get(str(one["loc"][0]), str(one["loc"][0]))
            found = {**general, **table}.get(name, one["input"])
            problems.append(f"{where}: {name}: found {found!r}; expected {one['msg'].removeprefix('Input should be ')}")
        return None
    return SetSource(config, listing is None, tuple(_notes(where, general, table, config)))


def _defaults(settings: SetSettings) -> dict[str, Any]:
    left_out = {"path", "control_path"}
    found = {name: getattr(settings, name) for name in SetSettings.model_fields if name not in left_out}
    return {**found, "buckets": False}


def _places(path: Path, where: str, table: Table, problems: list[str]) -> tuple[Path | None, Path | None, Path | None]:
    """Folder of pictures or else listing, and folder of controls."""
    found: dict[str, Path] = {}
    for name in PLACES:
        value = table.get(name)
        if isinstance(value, str) and value:
            found[name] = _beside(path, Path(value).expanduser())
        elif value is not None:
            problems.append(f"{where}: {name}: found {value!r}; expected a path")
    folder = found.get("image_directory", found.get("image_dir"))
    listing = found.get("image_jsonl_file")
    controls = found.get("control_directory", found.get("conditioning_data_dir"))
    videos = [name for name in VIDEOS if name in table]
    if videos:
        problems.append(f"{where}: {', '.join(videos)}: videos cannot be trained on; remove this set")
    elif folder is None and listing is None:
        problems.append(f"{where}: there is neither image_directory nor image_jsonl_file; give one of them")
    elif folder is not None and listing is not None:
        problems.append(f"{where}: image_directory and image_jsonl_file are both there; keep one of them")
    elif listing is not None and controls is not None:
        problems.append(f"{where}: control_directory is for image_directory; image_jsonl_file names its own controls")
    return folder, listing, controls


def _beside(path: Path, place: Path) -> Path:
    beside = path.parent / place
    return beside if not place.exists() and beside.exists() else place


def _notes(where: str, general: Table, table: Table, config: SetConfig) -> list[str]:
    both = {**general, **table}
    notes = [
        f"{where}: {name} = {both[name]!r} does not count: {here}" for name, here in ELSEWHERE.items() if name in both
    ]
    if "enable_bucket" not in both:
        width, height = config.frames[0]
        notes.append(f"{where}: without enable_bucket = true every picture is cut to {width}x{height} pixels")
    return notes


def _check_names(where: str, table: Table, known: Collection[str], problems: list[str]) -> None:
    problems += [f"{where}: {_unknown(name, known)}" for name in table if name not in known]


def _unknown(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    suggestion = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known)}"
    return f"{name}: there is no such setting{suggestion}"
