"""The draft's data set, as page *Data* shows it, and the demo's pictures as one of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dittocache.config import BUNDLED, RunConfig, check_config
from dittocache.data.browsing import Browsed, browse
from dittocache.data.config import DataConfig
from dittocache.errors import DataError, DittocacheError
from dittocache.studio.draft import given_settings
from dittocache.studio.state import Studio

DEMO_FOLDER = "demo-pictures"
USUAL_MULTIPLE = 32  # of the Qwen-Image edit families
TABLE_ENDINGS = (".toml", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


def data_settings(studio: Studio) -> DataConfig | None:
    """The draft's section `data`, whatever else is wrong in it; None where no data set is chosen yet.

    Raises ConfigError listing what is wrong with the section, AccessError for a path outside the allowed folders.
    """
    given = {name: value for name, value in studio.draft.given.items() if name.startswith("data.")}
    if not given.get("data.path") and not given.get("data.sets"):
        return None
    config = check_config({}, {**given, "model.path": BUNDLED}).data
    for path in (*config.paths, *(one.control_path for one in config.every_set if one.control_path is not None)):
        studio.path(path)
    return config


def browse_draft(studio: Studio, size_multiple: int) -> Browsed | None:
    """Everything in the draft's data set and all that is wrong with it; None where none is chosen yet.

    Args:
        size_multiple: as `size_multiple` says, or said last.
    """
    try:
        config = data_settings(studio)
        if config is None:
            return None
        return browse(config, size_multiple, studio.home / "memory")
    except DittocacheError as error:
        return Browsed(problems=list(error.problems) or [str(error)])


def copy_demo(studio: Studio) -> RunConfig:
    """Put the demo's pictures into the first allowed folder and its settings into the draft; run it on the worker.

    Pictures and captions that are there already stay as they are. Raises DataError where the folder cannot be written.
    """
    from dittocache.demo.model import SAMPLES_DIR
    from dittocache.jobs.demo_job import demo_config

    folder = studio.path(DEMO_FOLDER)
    try:
        for file in sorted(SAMPLES_DIR.rglob("*")):
            place = folder / file.relative_to(SAMPLES_DIR)
            if file.is_file() and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                temporary = place.with_name(f".{place.name}.partial")
                shutil.copyfile(file, temporary)
                os.replace(temporary, place)
    except OSError as error:
        raise DataError(f"the demo's pictures cannot be copied to {folder} ({error.strerror or error})") from error
    config = demo_config({"data.path": folder / "train", "held_out": folder / "heldout"})
    studio.draft.replace(given_settings(config))
    return config


def set_data(studio: Studio, path: Path) -> None:
    """Make this folder or table the draft's data set."""
    studio.draft.update({"data.path": str(path), "data.sets": None})


def size_multiple(studio: Studio) -> int:
    """Of what the sides of sizes are multiples, in pixels, for the draft's model; the strictest where it is not known.

    Needs torch: run it on the worker.
    """
    from dittocache.families.registry import get_family
    from dittocache.jobs.inputs import RunInputs
    from dittocache.jobs.quick_start import ANY_FAMILY

    try:
        config = studio.config({"data.path": str(studio.base)})
        return RunInputs(config, config.run_dir).family.size_multiple
    except (DittocacheError, OSError):
        return get_family(ANY_FAMILY).size_multiple
