"""Page *Train*: all settings, one button for the whole workflow, and the run as it goes."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from nicegui import run, ui

from dittocache.errors import DittocacheError
from dittocache.jobs.following.view import RunView
from dittocache.jobs.run_folder import LORA_NAME, is_locked
from dittocache.studio.layout import card, heading, problems_list, telling_errors
from dittocache.studio.memory import memory_words
from dittocache.studio.parts.chooser import choose
from dittocache.studio.parts.live_run import LiveRun
from dittocache.studio.parts.preset_dialog import choose_preset
from dittocache.studio.parts.settings_form import SettingsForm
from dittocache.studio.parts.stop_button import stop_button
from dittocache.studio.parts.waiting_line import WaitingLine
from dittocache.studio.presets import is_bare, load_file, quick_start, save_file
from dittocache.studio.run_choice import folder_of_run, run_to_show
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio
from dittocache.studio.training import resume_run, start_training

SETTINGS_ENDINGS = (".yaml", ".yml", ".toml")


def page(studio: Studio) -> None:
    """Build the page; `?run=NAME` shows that run."""
    heading("Train", "One button: check everything, encode what is missing, train the LoRA.")
    TrainPage(studio, ui.context.client.request.query_params.get("run", ""))


class TrainPage:
    """The button, the run that is shown, the settings."""

    def __init__(self, studio: Studio, asked: str) -> None:
        self._studio = studio
        self._asked = asked
        self._starting = False
        self._memory_of: dict[str, object] = {}
        with card():
            with ui.element("div").classes("line train-line"):
                with ui.element("div").classes("grow"):
                    self._what = ui.label().classes("wrap")
                    self._memory = ui.label().classes("muted small wrap")
                    self._warning = ui.label().classes("small warn wrap")
                self._train = ui.button("Train", icon="play_arrow", on_click=self._start)
                self._train.props("unelevated no-caps size=lg").classes("train-button")
            self._problems = ui.element("div").classes("stack")
        self._line = WaitingLine()
        self._live = LiveRun(self._controls)
        with card("Settings"):
            with ui.element("div").classes("line"):
                self._action("Quick start", "bolt", self._quick)
                self._action("Presets", "tune", self._preset)
                self._action("Load file", "upload_file", self._load)
                self._action("Save as YAML", "save", self._save)
            self._told = ui.label().classes("note pre")
            self._told.set_visibility(False)
            self._form = SettingsForm(studio, self._changed)
        self._changed()
        ui.timer(2.0, self._choose_run)
        ui.timer(1.5, self._estimate)

    def _action(self, label: str, icon: str, handler: object) -> None:
        ui.button(label, icon=icon, on_click=handler).props("outline dense no-caps").classes("action")

    def _changed(self) -> None:
        given = self._studio.draft.given
        model, data = given.get("model.path"), given.get("data.path")
        missing = [f"choose {what}" for what, value in (("a data set", data), ("a model", model)) if not value]
        if missing:
            self._what.set_text(f"First {' and '.join(missing)} on the pages Data and Model.")
            return
        what = f"Trains {shown(model)} on {shown(data)}."
        if is_bare(given):
            self._what.set_text(f"{what} How is chosen for you when you press Train; Quick start shows it first.")
            return
        folder = folder_of_run(self._studio)
        self._what.set_text(f"{what} The run is {shown(folder)}." if folder is not None else what)

    async def _choose_run(self) -> None:
        """Show the run that was asked for, else the one at work, else the draft's own."""
        found = await run.io_bound(run_to_show, self._studio, self._asked, self._live.run_dir)
        if found is not None:
            await self._live.show(found)
        own = folder_of_run(self._studio)
        at_work = own is not None and is_locked(own)
        if not self._starting and not self._train.is_deleted:
            self._train.set_text("Training" if at_work else "Train")
            self._train.set_enabled(not at_work)

    async def _estimate(self) -> None:
        given = self._studio.draft.given
        if given == self._memory_of or is_bare(given):
            return
        self._memory_of = given
        words = await self._studio.worker.run(memory_words, self._studio, given)
        if not self._memory.is_deleted:
            self._memory.set_text(shown(words.text, 1000))
            self._warning.set_text(shown(words.warning, 500))

    async def _start(self) -> None:
        self._problems.clear()
        self._form.check()
        self._train.disable()
        self._starting = True
        try:
            given = self._studio.draft.given
            if is_bare(given) and {"data.path", "model.path"} <= given.keys():
                self._say("\n".join(await self._studio.worker.run(quick_start, self._studio)))
                self._form.refresh()
            run_dir = await self._studio.worker.run(start_training, self._studio)
        except DittocacheError as error:
            with self._problems:
                problems_list(error.problems or [str(error)], "The training cannot start yet")
            return
        finally:
            self._starting = False
            self._train.enable()
        self._asked = ""
        await self._live.show(run_dir)
        await self._line.poll()

    def _controls(self, run_dir: Path, view: RunView) -> None:
        """The buttons of the run that is shown."""
        if view.state == "running":
            stop_button(run_dir, view)
        elif view.state in ("stopped", "failed", "died"):
            ui.button("Resume", icon="play_arrow", on_click=lambda: self._resume(run_dir)).props("unelevated no-caps")
        elif view.state == "finished" and (run_dir / LORA_NAME).is_dir():
            self._next(run_dir)

    def _next(self, run_dir: Path) -> None:
        """What is done with a LoRA that is trained."""
        for label, icon, page in (("Make pictures", "auto_awesome", "generate?source"), ("Report", "description", "")):
            target = f"/{page}={quote(run_dir.name)}" if page else "/reports"
            ui.button(label, icon=icon, on_click=lambda target=target: ui.navigate.to(target)).props("outline no-caps")
        with ui.button("LoRA", icon="content_copy", on_click=lambda: _copy(run_dir / LORA_NAME)).props("flat no-caps"):
            ui.tooltip(f"Copy the path of its folder, {shown(run_dir / LORA_NAME)}")

    async def _resume(self, run_dir: Path) -> None:
        with telling_errors():
            await self._studio.worker.run(resume_run, self._studio, run_dir)

    async def _quick(self) -> None:
        try:
            told = await self._studio.worker.run(quick_start, self._studio)
        except DittocacheError as error:
            self._say(str(error))
            return
        self._say("\n".join(told))
        self._form.refresh()

    async def _preset(self) -> None:
        chosen = await choose_preset(self._studio)
        if chosen is not None:
            self._say("\n".join((chosen.title, *chosen.notes)))
            self._form.refresh()

    async def _load(self) -> None:
        path = await choose(self._studio, "Load settings", endings=SETTINGS_ENDINGS, folders=False)
        if path is None:
            return
        try:
            load_file(self._studio, path)
        except DittocacheError as error:
            self._say(str(error))
            return
        self._say(f"These are the settings of {path}")
        self._form.refresh()

    async def _save(self) -> None:
        with ui.dialog() as dialog, ui.card():
            ui.label("Save settings").classes("card-title")
            name = ui.input("File", value=f"{self._studio.draft.given.get('name') or 'run'}.yaml").classes("mono full")
            with ui.element("div").classes("line end"):
                ui.button("Cancel", on_click=lambda: dialog.submit(None)).props("flat no-caps")
                ui.button("Save", on_click=lambda: dialog.submit(name.value)).props("unelevated no-caps")
        chosen = await dialog
        dialog.delete()
        if not chosen:
            return
        try:
            self._say(f"Saved as {save_file(self._studio, Path(str(chosen)))}")
        except DittocacheError as error:
            self._say(str(error))

    def _say(self, text: str) -> None:
        self._told.set_text("\n".join(shown(line, 1000) for line in text.splitlines()))
        self._told.set_visibility(bool(text))


def _copy(folder: Path) -> None:
    ui.clipboard.write(str(folder))
    ui.notify(f"Copied: {shown(folder)}")
