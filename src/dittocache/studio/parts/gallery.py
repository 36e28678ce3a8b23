"""The samples of a set as small pictures with captions, page by page, and one of them to look at and to caption."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from nicegui import ui

from dittocache.data.browsing import Browsed, Item, write_caption
from dittocache.errors import DittocacheError
from dittocache.studio.layout import card
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio
from dittocache.studio.thumbnails import picture_url, thumbnail_url

A_PAGE = 48
MOST_CONTROLS = 3


class Gallery:
    """A card with a search field, small pictures and page numbers.

    Args:
        changed: called after a caption was written.
    """

    def __init__(self, studio: Studio, changed: Callable[[], Awaitable[None]]) -> None:
        self._studio = studio
        self._changed = changed
        self._found = Browsed()
        self._numbers: list[int] = []
        with card("Samples") as self._card:
            with ui.element("div").classes("line"):
                self._search = (
                    ui.input("Search names and captions", on_change=self._filter)
                    .props("outlined dense clearable debounce=250")
                    .classes("grow")
                )
                self._count = ui.label().classes("muted small").props("aria-live=polite")
            self._grid = ui.element("div").classes("gallery")
            self._pages = ui.pagination(1, 1, direction_links=True, on_change=self._fill).props("max-pages=7")
        self._viewer = _Viewer(studio, self._written)

    def show(self, found: Browsed) -> None:
        """Show another set, or the same after a change."""
        self._found = found
        self._card.set_visibility(len(found) > 0)
        self._filter()

    def _filter(self) -> None:
        self._numbers = self._found.matching(self._search.value or "")
        self._count.set_text(f"{len(self._numbers):,} of {len(self._found):,}")
        self._pages.max = max(1, -(-len(self._numbers) // A_PAGE))
        self._pages.set_visibility(self._pages.max > 1)
        if self._pages.value > self._pages.max:
            self._pages.set_value(1)  # fills
        else:
            self._fill()

    def _fill(self) -> None:
        first = (self._pages.value - 1) * A_PAGE
        self._grid.clear()
        with self._grid:
            for number in self._numbers[first : first + A_PAGE]:
                self._tile(number, self._found.item(number))

    def _tile(self, number: int, item: Item) -> None:
        with ui.element("button").classes("tile").on("click", lambda: self._viewer.open(self._found, number)) as tile:
            tile.mark(f"sample-{number}").props["aria-label"] = f"Open {shown(item.name)}"
            with ui.element("div").classes("tile-pictures"):
                small_picture(item.target, 256, "tile-target")
                with ui.element("div").classes("tile-controls"):
                    for control in item.controls[:MOST_CONTROLS]:
                        small_picture(control, 96)
                    if len(item.controls) > MOST_CONTROLS:
                        ui.label(f"+{len(item.controls) - MOST_CONTROLS}").classes("muted small")
            ui.label(shown(item.name, 60)).classes("mono small tile-name")
            if item.caption:
                ui.label(shown(item.caption, 300)).classes("tile-caption")
            else:
                ui.label("no caption").classes("tile-caption bad")

    async def _written(self) -> None:
        await self._changed()


class _Viewer:
    """A dialog with one sample: its pictures, its size, its caption to edit."""

    def __init__(self, studio: Studio, written: Callable[[], Awaitable[None]]) -> None:
        self._studio = studio
        self._written = written
        self._found = Browsed()
        self._number = 0
        with ui.dialog() as self._dialog, ui.card().classes("viewer"):
            with ui.element("div").classes("line nowrap"):
                self._name = ui.label().classes("card-title mono wrap grow")
                self._step(-1, "chevron_left", "Previous sample")
                self._step(1, "chevron_right", "Next sample")
                ui.button(icon="close", on_click=self._dialog.close).props('flat dense round aria-label="Close"')
            self._pictures = ui.element("div").classes("viewer-pictures")
            self._size = ui.label().classes("muted small")
            self._caption = ui.textarea("Caption").props("outlined autogrow").classes("full")
            with ui.element("div").classes("line"):
                self._place = ui.label().classes("muted small mono wrap grow")
                self._save = ui.button("Save caption", icon="save", on_click=self._write).props("unelevated no-caps")

    def open(self, found: Browsed, number: int) -> None:
        """Show one sample of a set."""
        self._found, self._number = found, number
        item = found.item(number)
        self._name.set_text(shown(item.name))
        self._pictures.clear()
        with self._pictures:
            for number_of, control in enumerate(item.controls, start=1):
                _large_picture(control, f"control {number_of}" if len(item.controls) > 1 else "control")
            _large_picture(item.target, "target")
            if item.mask is not None:
                _large_picture(item.mask, "mask")
        self._size.set_text(_sizes(item))
        self._caption.set_value(item.caption)
        self._caption.set_enabled(item.caption_file is not None)
        self._save.set_visibility(item.caption_file is not None)
        file = item.caption_file
        self._place.set_text(shown(file) if file is not None else "the caption is in the table; edit it there")
        self._dialog.open()

    def _step(self, by: int, icon: str, label: str) -> None:
        button = ui.button(icon=icon, on_click=lambda: self.open(self._found, (self._number + by) % len(self._found)))
        button.props(f'flat dense round aria-label="{label}"')

    async def _write(self) -> None:
        file = self._found.item(self._number).caption_file
        if file is None:
            return
        try:
            write_caption(self._studio.path(file), str(self._caption.value or ""))
        except DittocacheError as error:
            ui.notify(shown(error, 500), type="negative")
            return
        ui.notify("Caption saved", type="positive")
        self._dialog.close()
        await self._written()


def small_picture(path: Path, side: int, classes: str = "") -> None:
    """A small picture, loaded when it is scrolled into view."""
    picture = ui.element("img").classes(classes)
    picture.props["src"] = thumbnail_url(path, side)
    picture.props["alt"] = ""
    picture.props["loading"] = "lazy"


def _large_picture(path: Path, role: str) -> None:
    with ui.element("figure"):
        link = ui.element("a")
        link.props["href"] = picture_url(path)
        link.props["target"] = "_blank"
        with link:
            picture = ui.element("img")
            picture.props["src"] = thumbnail_url(path, 768)
            picture.props["alt"] = role
        ui.label(f"{role}: {shown(path.name, 60)}").classes("muted small wrap")


def _sizes(item: Item) -> str:
    if item.size is None:
        return "the target cannot be read"
    brought = ", ".join(f"{width} × {height}" for width, height in item.buckets)
    return f"{item.size[0]} × {item.size[1]} pixels, trained at {brought}"
