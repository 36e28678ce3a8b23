"""The demo's pictures, which lie where dittocache is installed: outside the Studio's folders, and still to be seen."""

from __future__ import annotations

from pathlib import Path

from dittocache.config import RunConfig
from dittocache.studio.state import Studio


def is_bundled(path: Path) -> bool:
    """Whether the path is one of the demo's. Needs torch."""
    from dittocache.demo.model import SAMPLES_DIR

    return path.resolve().is_relative_to(SAMPLES_DIR.resolve())


def check_data(studio: Studio, config: RunConfig) -> None:
    """Raise AccessError where a data set of these settings, the one held out too, is none that may be shown."""
    held_out = [] if config.held_out is None else [config.held_out]
    for path in (*config.data.paths, *held_out):
        if not is_bundled(studio.base / path):
            studio.path(path)
