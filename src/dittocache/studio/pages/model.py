"""Page *Model*: which checkpoint, what it is, what of it is missing."""

from __future__ import annotations

from nicegui import ui

from dittocache.studio.layout import card, heading, next_step, problems_list
from dittocache.studio.model_check import ModelCheck, check_model, known_families, known_models
from dittocache.studio.parts.chooser import choose
from dittocache.studio.parts.tables import row, table
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio
from dittocache.studio.words import byte_count

DTYPES = ("bfloat16", "float16", "float32")
OWN = "as the checkpoint says"


def page(studio: Studio) -> None:
    """Build the page; the checkpoint is looked at after the page is there."""
    heading("Model", "The checkpoint to train: a folder, or the id of one that was downloaded from the hub.")
    ModelPage(studio)


class ModelPage:
    """Choice and check of the model."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._version = -1
        self._showing = False
        with card():
            with ui.element("div").classes("line nowrap"):
                self._path = (
                    ui.input("Folder or hub id", placeholder="Qwen/Qwen-Image-Edit-2511")
                    .classes("grow mono")
                    .props("outlined dense stack-label")
                    .on("keydown.enter", self._typed)
                    .on("blur", self._typed)
                )
                ui.button("Browse", icon="folder_open", on_click=self._browse).props("unelevated no-caps")
            self._known = ui.element("div").classes("line")
            with ui.element("div").classes("columns narrow"):
                self._family = self._select("model.family", "Family", [OWN])
                self._dtype = self._select("model.dtype", "Number format of frozen weights", list(DTYPES))
                self._device = ui.input("Device", placeholder="auto").props("outlined dense stack-label")
                self._device.on("blur", self._device_typed).on("keydown.enter", self._device_typed)
            with ui.element("div").classes("line"):
                self._state = ui.label().classes("grow").props("aria-live=polite")
                self._next = ui.element("div").classes("line shrink")
        self._findings = ui.element("div").classes("stack")
        ui.timer(0, self._begin, once=True)
        ui.timer(2.0, self._follow, immediate=False)

    def _select(self, name: str, label: str, options: list[str]) -> ui.select:
        select = ui.select(options, label=label, on_change=lambda event: self._give(name, event.value))
        return select.props("outlined dense options-dense")

    async def _begin(self) -> None:
        await self._load()
        families = await self._studio.worker.run(known_families)
        if not self._family.is_deleted:
            self._showing = True
            self._family.set_options([OWN, *families], value=self._studio.draft.given.get("model.family") or OWN)
            self._showing = False
        models = await self._studio.worker.run(known_models)
        if self._known.is_deleted:
            return
        with self._known:
            ui.label("On this machine:").classes("muted small")
            for model in models:
                ui.button(shown(model), on_click=lambda model=model: self._choose(model)).props(
                    "outline dense no-caps"
                ).classes("action")

    async def _follow(self) -> None:
        """Another tab may choose another model."""
        if self._studio.draft.version != self._version:
            await self._load()

    async def _load(self) -> None:
        draft = self._studio.draft
        self._version, given = draft.version, draft.given
        self._showing = True
        self._path.set_value(str(given.get("model.path") or ""))
        family = given.get("model.family") or OWN
        self._family.set_value(family if family in self._family.options else OWN)
        self._dtype.set_value(given.get("model.dtype") if given.get("model.dtype") in DTYPES else DTYPES[0])
        self._device.set_value(str(given.get("model.device") or ""))
        self._showing = False
        self._state.set_text("Looking at the checkpoint …")
        found = await self._studio.worker.run(check_model, self._studio)
        if self._findings.is_deleted:
            return
        self._state.set_text(_summary(found))
        self._next.clear()
        if found is not None and not found.problems:
            with self._next:
                named = "data.path" in self._studio.draft.given
                next_step("Train" if named else "Choose the data", "/train" if named else "/data")
        self._findings.clear()
        with self._findings:
            _show(found)

    async def _typed(self) -> None:
        await self._choose(str(self._path.value or "").strip())

    async def _choose(self, model: str) -> None:
        if model != str(self._studio.draft.given.get("model.path") or ""):
            self._studio.draft.set("model.path", model or None)
            await self._load()

    async def _browse(self) -> None:
        chosen = await choose(self._studio, "Choose the folder of a checkpoint", self._path.value or "")
        if chosen is not None:
            await self._choose(str(chosen))

    async def _device_typed(self) -> None:
        await self._give("model.device", str(self._device.value or "").strip())

    async def _give(self, name: str, value: object) -> None:
        if self._showing:
            return
        given = None if value in (OWN, "", None) else str(value)
        if given != self._studio.draft.given.get(name):
            self._studio.draft.set(name, given)
            await self._load()


def _summary(found: ModelCheck | None) -> str:
    if found is None:
        return "No model is chosen yet. `bundled` is the small one that comes with dittocache, for trials.".replace(
            "`", ""
        )
    if found.problems:
        return "This model cannot be trained yet"
    return f"Complete: {found.family}, runs on {found.device}"


def _show(found: ModelCheck | None) -> None:
    if found is None:
        return
    if found.problems:
        problems_list(found.problems, "What is missing or wrong")
    if not found.components:
        return
    with card("Parts", f"{found.pipeline} in {shown(found.folder)}"), table("Part", "Class", "Weights", "What for"):
        for part in found.components:
            weights = byte_count(part.weight_bytes) if part.weight_bytes else ""
            row(shown(part.name), shown(part.kind), weights, part.role, mono=(0, 1, 2))
