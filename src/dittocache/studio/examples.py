"""An edit to try a model with: from the set that its run held out, else from the one that it was trained on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dittocache.data.browsing import browse
from dittocache.errors import DataError
from dittocache.studio.bundled import check_data, is_bundled
from dittocache.studio.picture_request import chosen_source, source_config
from dittocache.studio.state import Studio
from dittocache.studio.uploads import keep_picture

UPLOADS_NAME = "uploads"
SIZE_MULTIPLE = 16  # the pictures are only looked up: any bucket size will do


@dataclass(frozen=True)
class Example:
    """A caption and the pictures that it is about, inside the Studio's folders."""

    prompt: str
    images: tuple[Path, ...]


def pick_example(studio: Studio, given: Mapping[str, Any]) -> Example:
    """One at random, for the model that the request names. Run it on the worker: it needs torch, and reads the set.

    The demo's own pictures, which lie where dittocache is installed, are copied. Raises AccessError for any other set
    outside the allowed folders, DataError where it holds nothing, ConfigError for a run whose settings cannot be read.
    """
    config = source_config(studio, chosen_source(studio, given))
    data = config.data if config.held_out is None else config.data.held_out(config.held_out)
    check_data(studio, config)
    found = browse(data, SIZE_MULTIPLE, studio.home / "memory")
    if not len(found):
        raise DataError("the data set holds no sample that can be read; see page Data")
    item = found.item(random.randrange(len(found)))
    return Example(item.caption, tuple(_inside(studio, path) for path in item.controls))


def _inside(studio: Studio, path: Path) -> Path:
    """The picture, or a copy of a bundled one; a table may name any path, which must be inside as everywhere."""
    if is_bundled(path):
        return keep_picture(path.read_bytes(), path.name, studio.home / UPLOADS_NAME)
    return studio.path(path)
