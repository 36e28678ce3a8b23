"""A dialog in which a file or folder of the machine that the Studio runs on is chosen, inside the allowed folders."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from nicegui import ui

from dittocache.data.pictures import ENDINGS
from dittocache.errors import AccessError
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio

MOST_ENTRIES = 500


@dataclass(frozen=True)
class Listing:
    """What is in a folder, by name, hidden files left out.

    Attributes:
        folders, files: paths; of files those that may be chosen.
        pictures: how many there are.
        left_out: entries beyond `MOST_ENTRIES`.
        problem: why nothing is listed.
    """

    folders: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()
    pictures: int = 0
    left_out: int = 0
    problem: str = ""


def listing(folder: Path, endings: Collection[str]) -> Listing:
    """Look into a folder for other folders and for files with these endings."""
    folders, files, pictures = [], [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                ending = Path(entry.name).suffix.lower()
                if entry.is_dir():
                    folders.append(Path(entry.path))
                    continue
                pictures += ending in ENDINGS
                if ending in endings:
                    files.append(Path(entry.path))
    except OSError as error:
        return Listing(problem=f"{folder} cannot be read ({error.strerror or error})")
    folders.sort()
    files.sort()
    left_out = max(0, len(folders) + len(files) - MOST_ENTRIES)
    folders = folders[:MOST_ENTRIES]
    return Listing(tuple(folders), tuple(files[: MOST_ENTRIES - len(folders)]), pictures, left_out)


async def choose(
    studio: Studio, title: str, start: str | Path = "", endings: Collection[str] = (), folders: bool = True
) -> Path | None:
    """Let the user choose; None where they do not.

    Args:
        start: where to begin: a folder, or a file in it; the first allowed folder where that is not there.
        endings: of files that may be chosen; none for folders only.
        folders: whether a folder may be chosen.
    """
    chooser = _Chooser(studio, title, frozenset(endings), folders)
    chooser.enter(_beginning(studio, start))
    chosen = await chooser.dialog
    chooser.dialog.delete()
    return chosen if isinstance(chosen, Path) else None


def _beginning(studio: Studio, start: str | Path) -> Path:
    if not str(start):
        return studio.base
    try:
        path = studio.path(start)
    except AccessError:
        return studio.base
    while not path.is_dir() and path.parent != path:
        path = path.parent
    return path if studio.roots.holds(path) else studio.base


class _Chooser:
    """The dialog and the folder that it shows."""

    def __init__(self, studio: Studio, title: str, endings: frozenset[str], folders: bool) -> None:
        self._studio = studio
        self._endings = endings
        self._folders = folders
        self._folder = studio.base
        with ui.dialog() as self.dialog, ui.card().classes("chooser"):
            ui.label(title).classes("card-title")
            with ui.element("div").classes("line"):
                for root in studio.roots.folders if len(studio.roots.folders) > 1 else ():
                    ui.button(shown(root.name or root), icon="home", on_click=lambda root=root: self.enter(root)).props(
                        "flat dense no-caps"
                    )
            with ui.element("div").classes("line nowrap"):
                self._up = ui.button(icon="arrow_upward", on_click=lambda: self.enter(self._folder.parent)).props(
                    'flat dense round aria-label="To the folder above"'
                )
                self._here = ui.label().classes("mono wrap grow")
            self._entries = ui.element("div").classes("chooser-entries")
            self._what = ui.label().classes("muted small")
            with ui.element("div").classes("line end"):
                ui.button("Cancel", on_click=lambda: self.dialog.submit(None)).props("flat no-caps")
                if folders:
                    ui.button("Choose this folder", on_click=lambda: self.dialog.submit(self._folder)).props(
                        "unelevated no-caps"
                    )

    def enter(self, folder: Path) -> None:
        """Show another folder; one outside the allowed folders is not entered."""
        if not self._studio.roots.holds(folder):
            return
        self._folder = folder
        found = listing(folder, self._endings)
        self._here.set_text(shown(folder))
        self._up.set_enabled(self._studio.roots.holds(folder.parent) and folder.parent != folder)
        self._entries.clear()
        with self._entries:
            for inner in found.folders:
                self._entry(inner, "folder", lambda inner=inner: self.enter(inner))
            for file in found.files:
                self._entry(file, "draft", lambda file=file: self.dialog.submit(file))
            if not found.folders and not found.files:
                nothing = "no other folders in here" if found.pictures else "nothing to choose in here"
                ui.label(found.problem or nothing).classes("muted small q-pa-sm")
        pictures = f"{found.pictures} pictures in this folder" if found.pictures else "no pictures in this folder"
        more = f"; {found.left_out} more entries are not listed" if found.left_out else ""
        top = not self._studio.roots.holds(folder.parent)
        other = ". For folders elsewhere, start the Studio with --root FOLDER" if top else ""
        self._what.set_text(pictures + more + other)

    def _entry(self, path: Path, icon: str, chosen: object) -> None:
        with ui.element("button").classes("chooser-entry").on("click", chosen):
            ui.icon(icon)
            ui.label(shown(path.name)).classes("wrap")
