"""A dialog with the ready settings and the memory that each takes."""

from __future__ import annotations

from nicegui import ui

from dittocache.config import check_config
from dittocache.errors import DittocacheError
from dittocache.studio.memory import memory_words
from dittocache.studio.presets import Preset, preset_settings, presets
from dittocache.studio.state import Studio
from dittocache.studio.training import refuse_outside
from dittocache.studio.words import byte_count


async def choose_preset(studio: Studio) -> Preset | None:
    """Let the user choose one; it is in the draft when this returns. None where they do not."""
    dialog = _PresetDialog(studio)
    timer = ui.timer(0, dialog.estimate, once=True)
    chosen = await dialog.dialog
    timer.cancel()
    dialog.dialog.delete()
    if not isinstance(chosen, Preset):
        return None
    studio.draft.replace(preset_settings(chosen, studio.draft.given))
    return chosen


class _PresetDialog:
    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._estimates: dict[str, ui.label] = {}
        self._entries: dict[str, ui.element] = {}
        with ui.dialog() as self.dialog, ui.card().classes("chooser wide"):
            ui.label("Presets").classes("card-title")
            ui.label("A preset keeps your data, your model and your run's name.").classes("muted")
            with ui.element("div").classes("chooser-entries"):
                for preset in presets():
                    self._entry(preset)
            with ui.element("div").classes("line end"):
                ui.button("Cancel", on_click=lambda: self.dialog.submit(None)).props("flat no-caps")

    def _entry(self, preset: Preset) -> None:
        with ui.element("button").classes("preset-entry").on("click", lambda: self.dialog.submit(preset)) as entry:
            ui.label(preset.title).classes("preset-title")
            for note in preset.notes:
                ui.label(note).classes("muted small")
            self._estimates[preset.name] = ui.label().classes("small accent")
        self._entries[preset.name] = entry

    async def estimate(self) -> None:
        """Say of each preset what it takes with the data and model at hand, and put those that fit the model first."""
        fitting = 0
        given = self._studio.draft.given
        if "data.path" not in given or "model.path" not in given:
            return
        for preset in presets():
            total = await self._studio.worker.run(_estimate, self._studio, preset, given)
            if self.dialog.is_deleted:
                return
            if total is not None:
                self._entries[preset.name].move(target_index=fitting)
                fitting += 1
                self._estimates[preset.name].set_text(f"With your data and model: about {byte_count(total)} on the GPU")


def _estimate(studio: Studio, preset: Preset, given: dict[str, object]) -> int | None:
    """Bytes on the device; None where the preset is for another family, or that is not known."""
    from dittocache.jobs.inputs import RunInputs

    try:
        settings = {name: value for name, value in preset_settings(preset, given).items() if value is not None}
        own = {**settings, "model.path": given["model.path"]}
        without = {name: value for name, value in own.items() if name != "model.family"}
        config = check_config({}, without)
        refuse_outside(studio, config)
        if RunInputs(config, config.run_dir).family.name != settings.get("model.family"):
            return None
    except DittocacheError:
        return None
    return memory_words(studio, own).total
