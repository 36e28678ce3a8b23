"""The pictures that a run has made, newest first, beside what they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nicegui import ui

from dittocache.jobs.following.view import SampleView
from dittocache.studio.shown import shown
from dittocache.studio.thumbnails import picture_url, thumbnail_url
from dittocache.studio.words import duration

MOST = 24


class RunPictures:
    """A grid that is hidden until there is a picture."""

    def __init__(self) -> None:
        with ui.element("div").classes("stack") as self._part:
            ui.label("Pictures").classes("card-title").props("role=heading aria-level=3")
            self._grid = ui.element("div").classes("gallery")
        self._part.set_visibility(False)

    def show(self, run_dir: Path, samples: Sequence[SampleView]) -> None:
        """Show the newest of these."""
        self._part.set_visibility(bool(samples))
        self._grid.clear()
        with self._grid:
            for sample in list(reversed(samples))[:MOST]:
                _tile(run_dir, sample)


def _tile(run_dir: Path, sample: SampleView) -> None:
    file = run_dir / sample.picture
    what = [f"step {sample.step}"] if sample.step is not None else []
    what += [sample.label] if sample.label else []
    what += [duration(sample.seconds)] if sample.seconds is not None else []
    tile = ui.element("a").classes("tile")
    tile.props["href"] = picture_url(file)
    tile.props["target"] = "_blank"
    with tile:
        with ui.element("div").classes("tile-pictures"):
            picture = ui.element("img").classes("tile-target")
            picture.props["src"] = thumbnail_url(file, 256)
            picture.props["alt"] = shown(f"{' '.join(what)}: {sample.caption}", 200)
            picture.props["loading"] = "lazy"
        ui.label(" · ".join(what)).classes("mono small tile-name")
        ui.label(shown(sample.caption, 200)).classes("tile-caption")
