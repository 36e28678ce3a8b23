"""What every page has around it: header, navigation, one theme in light and dark.

Tailwind is not loaded (it compiles styles in the browser and delays the first paint): pages use Quasar's classes
(`row`, `col`, `items-center`, `q-mt-md`) and the classes of `assets/studio.css` (`card`, `muted`, `grid`, `mono`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nicegui import ui

from dittocache.errors import DittocacheError
from dittocache.studio.parts.run_chip import RunChip
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio

THEME_COOKIE = "studio-theme"
THEMES = {"auto": None, "light": False, "dark": True}
THEME_ICONS = {"auto": "brightness_auto", "light": "light_mode", "dark": "dark_mode"}


@dataclass(frozen=True)
class Place:
    """One entry of the navigation."""

    path: str
    title: str
    icon: str


PLACES = (
    Place("/data", "Data", "photo_library"),
    Place("/model", "Model", "account_tree"),
    Place("/cache", "Cache", "inventory_2"),
    Place("/train", "Train", "model_training"),
    Place("/generate", "Generate", "auto_awesome"),
    Place("/reports", "Reports", "description"),
    Place("/runs", "Runs", "history"),
)


@contextmanager
def frame(studio: Studio, path: str) -> Iterator[None]:
    """Build header and navigation; what the block builds is the page at `path`."""
    ui.colors(primary="#2f6f6a", secondary="#5b6b79", accent="#b4632d", positive="#2e7d4f", negative="#b3362c")
    place = next(one for one in PLACES if one.path == path)
    ui.page_title(f"{place.title} · dittocache Studio")
    with ui.header().classes("studio-header"):
        menu = ui.button(icon="menu").props('flat dense round aria-label="Navigation"').classes("studio-menu")
        ui.link("dittocache Studio", "/").classes("studio-brand")
        ui.space()
        RunChip(studio)
        _theme_button()
    # `show-if-above` and not `value=None`, for which NiceGUI asks the browser and complains when it is slow to answer.
    with ui.left_drawer(value=False).props("show-if-above width=208 breakpoint=900").classes("studio-drawer") as drawer:
        _navigation(place)
    menu.on_click(drawer.toggle)
    with ui.element("div").classes("studio-main") as content:
        ui.skip_link("Skip to the page", target=content)
        yield


def heading(title: str, what: str = "") -> None:
    """The title of a page and one line that says what it is for."""
    with ui.element("div").classes("studio-heading"):
        ui.label(title).classes("studio-title").props("role=heading aria-level=1")
        if what:
            ui.label(what).classes("muted")


@contextmanager
def card(title: str = "", what: str = "") -> Iterator[ui.element]:
    """A framed part of a page with its title."""
    with ui.element("section").classes("card") as section:
        if title:
            ui.label(title).classes("card-title").props("role=heading aria-level=2")
        if what:
            ui.label(what).classes("muted")
        yield section


def problems_list(problems: Sequence[str], title: str) -> None:
    """Everything that is wrong, one line each."""
    with ui.element("div").classes("problems").props("role=alert"):
        ui.label(title).classes("problems-title")
        with ui.element("ul"):
            for problem in problems:
                with ui.element("li"):
                    ui.label(shown(problem, limit=2000))


def next_step(words: str, path: str) -> ui.button:
    """A button that leads to the page where one goes on."""
    button = ui.button(words, icon="arrow_forward", on_click=lambda: ui.navigate.to(path))
    return button.props("unelevated no-caps")


@contextmanager
def telling_errors() -> Iterator[None]:
    """Show what the block raises as a notification."""
    try:
        yield
    except DittocacheError as error:
        ui.notify(shown(error, 1000), type="negative", multi_line=True, close_button=True)


def _navigation(here: Place) -> None:
    with ui.element("nav").props('aria-label="Pages"'):
        for place in PLACES:
            with ui.link(target=place.path).classes("studio-nav" + (" here" if place is here else "")) as link:
                ui.icon(place.icon)
                ui.label(place.title)
            if place is here:
                link.props('aria-current="page"')


def _theme_button() -> None:
    request = ui.context.client.request
    chosen = request.cookies.get(THEME_COOKIE, "auto") if request is not None else "auto"
    chosen = chosen if chosen in THEMES else "auto"
    dark = ui.dark_mode(THEMES[chosen])

    def turn() -> None:
        nonlocal chosen
        names = list(THEMES)
        chosen = names[(names.index(chosen) + 1) % len(names)]
        dark.set_value(THEMES[chosen])
        button.props(f'icon={THEME_ICONS[chosen]} aria-label="Theme: {chosen}"')
        tip.set_text(f"Theme: {chosen}")
        ui.run_javascript(f"document.cookie = '{THEME_COOKIE}={chosen}; path=/; max-age=31536000; SameSite=Strict'")

    button = ui.button(icon=THEME_ICONS[chosen], on_click=turn).props(f'flat dense round aria-label="Theme: {chosen}"')
    with button:
        tip = ui.tooltip(f"Theme: {chosen}")
