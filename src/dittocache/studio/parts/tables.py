"""Tables, and numbers with their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nicegui import ui


@contextmanager
def table(*titles: str) -> Iterator[None]:
    """A table with these column titles; the block adds rows. It scrolls sideways where the page is too narrow."""
    with ui.element("div").classes("scroll-x"), ui.element("table").classes("table"):
        with ui.element("thead"), ui.element("tr"):
            for title in titles:
                with ui.element("th").props("scope=col"):
                    ui.label(title)
        with ui.element("tbody"):
            yield


def row(*cells: str, mono: Sequence[int] = ()) -> None:
    """A row of texts; the columns `mono` in a typewriter's letters."""
    with ui.element("tr"):
        for number, cell in enumerate(cells):
            with ui.element("td").classes("mono" if number in mono else ""):
                ui.label(cell).classes("wrap")


def numbers(found: Sequence[tuple[str, str]]) -> None:
    """Names and values, side by side as far as they fit."""
    with ui.element("dl").classes("numbers"):
        for name, value in found:
            with ui.element("div"):
                with ui.element("dt"):
                    ui.label(name).classes("muted small")
                with ui.element("dd"):
                    ui.label(value).classes("number")
