"""Page *Data*: the chosen set with everything that is wrong in it, its sizes, its captions."""

from __future__ import annotations

from nicegui import run, ui

from dittocache.data.browsing import Browsed
from dittocache.errors import DittocacheError
from dittocache.studio.data_set import TABLE_ENDINGS, USUAL_MULTIPLE, browse_draft, copy_demo, set_data, size_multiple
from dittocache.studio.layout import card, heading, next_step, problems_list
from dittocache.studio.parts.chooser import choose
from dittocache.studio.parts.gallery import Gallery
from dittocache.studio.parts.size_chart import size_chart
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio
from dittocache.studio.words import counted


def page(studio: Studio) -> None:
    """Build the page; the set is looked at after the page is there."""
    heading("Data", "The pictures to learn from, what they are made from, and the captions that ask for them.")
    DataPage(studio)


class DataPage:
    """The parts of the page and the set that they show."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._version = -1
        with card():
            with ui.element("div").classes("line nowrap"):
                self._path = (
                    ui.input("Folder, table or TOML list")
                    .classes("grow mono")
                    .props("outlined dense")
                    .on("keydown.enter", self._typed)
                    .on("blur", self._typed)
                )
                ui.button("Browse", icon="folder_open", on_click=self._browse).props("unelevated no-caps")
            with ui.element("div").classes("line"):
                self._summary = ui.label().classes("grow").props("aria-live=polite")
                ui.button("Look again", icon="refresh", on_click=self._load).props("flat dense no-caps")
                ui.button("Use the demo's 40 pictures", icon="science", on_click=self._demo).props("flat dense no-caps")
                self._next = ui.element("div").classes("line shrink")
        self._findings = ui.element("div").classes("stack")
        self._gallery = Gallery(studio, self._load)
        ui.timer(2.0, self._follow)

    async def _follow(self) -> None:
        """Another tab may choose another set."""
        if self._studio.draft.version != self._version:
            await self._load()

    async def _load(self) -> None:
        self._version = self._studio.draft.version
        self._path.set_value(str(self._studio.draft.given.get("data.path") or ""))
        self._summary.set_text("Looking at the files …")
        known = self._studio.memory.get("size_multiple", USUAL_MULTIPLE)
        found = await run.io_bound(browse_draft, self._studio, known)
        if self._findings.is_deleted:
            return
        self._show(found)
        multiple = await self._studio.worker.run(size_multiple, self._studio)
        if multiple != known:
            self._studio.memory["size_multiple"] = multiple
            found = await run.io_bound(browse_draft, self._studio, multiple)
            if not self._findings.is_deleted:
                self._show(found)

    def _show(self, found: Browsed | None) -> None:
        self._summary.set_text(_summary(found))
        self._next.clear()
        if found is not None and len(found) and not found.problems:
            with self._next:
                named = "model.path" in self._studio.draft.given
                next_step("Train" if named else "Choose a model", "/train" if named else "/model")
        self._findings.clear()
        with self._findings:
            _show_findings(found)
        self._gallery.show(found or Browsed())

    async def _typed(self) -> None:
        typed = str(self._path.value or "").strip()
        if typed != str(self._studio.draft.given.get("data.path") or ""):
            self._studio.draft.set("data.path", typed or None)
            await self._load()

    async def _browse(self) -> None:
        start = self._path.value or ""
        chosen = await choose(self._studio, "Choose the data set", start, TABLE_ENDINGS)
        if chosen is not None:
            set_data(self._studio, chosen)
            await self._load()

    async def _demo(self) -> None:
        try:
            config = await self._studio.worker.run(copy_demo, self._studio)
        except DittocacheError as error:
            ui.notify(shown(error, 500), type="negative")
            return
        ui.notify(f"The demo's pictures are in {shown(config.data.path)}; its settings are on page Train")
        await self._load()


def _summary(found: Browsed | None) -> str:
    if found is None:
        return (
            "No data set is chosen yet. Choose a folder of pictures with a .txt caption beside each, or try the demo."
        )
    counts = [counted(len(found), "sample")]
    if found.problems:
        counts.append(counted(len(found.problems), "problem"))
    elif len(found):
        counts.append("nothing wrong")
    return " · ".join(counts)


def _show_findings(found: Browsed | None) -> None:
    if found is None:
        return
    if found.problems:
        problems_list(found.problems, "This keeps the set from being trained on")
        if any("no caption" in problem for problem in found.problems):
            ui.label("A caption can be written here: click its picture below.").classes("note")
    for note in found.notes:
        ui.label(shown(note, 1000)).classes("note")
    sizes = found.buckets()
    if sizes:
        with card("Sizes", "Each picture is brought to one of these sizes in pixels; a batch holds one size."):
            size_chart(sizes)
