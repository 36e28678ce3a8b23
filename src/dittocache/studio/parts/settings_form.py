"""All settings as a form, written to the draft as they are typed, with what is wrong beside each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nicegui import ui

from dittocache.errors import ConfigError
from dittocache.studio.form_fields import GROUPS, FormField, form_fields, problems_by_field, shown_value, typed_value
from dittocache.studio.parts.chooser import choose
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio

OPEN_AT_FIRST = ("", "train")


class SettingsForm:
    """The groups of settings with a search field above them.

    Args:
        changed: called after a setting was changed here or in another tab.
    """

    def __init__(self, studio: Studio, changed: Callable[[], None]) -> None:
        self._studio = studio
        self._changed = changed
        self._version = studio.draft.version
        self._editors: dict[str, _Editor] = {}
        self._groups: dict[str, Any] = {}
        with ui.element("div").classes("line"):
            self._search = (
                ui.input("Search settings and their help", on_change=self._filter)
                .props("outlined dense clearable debounce=200")
                .classes("grow")
            )
            self._only_given = ui.switch("Only what I set", on_change=self._filter)
        given = studio.draft.given
        for group, (title, what) in GROUPS.items():
            with ui.expansion(title, caption=what, value=group in OPEN_AT_FIRST).classes("settings-group") as expansion:
                self._groups[group] = expansion
                with ui.element("div").classes("settings"):
                    for field in form_fields():
                        if field.group == group:
                            self._editors[field.name] = _Editor(studio, field, given, self._edited)
        self._nothing = ui.label("No setting has these words.").classes("muted")
        self._nothing.set_visibility(False)
        self.check()
        ui.timer(1.0, self._follow)

    def check(self) -> list[str]:
        """Show beside each setting what is wrong with it, and return everything that is wrong."""
        problems: tuple[str, ...] = ()
        try:
            self._studio.config()
        except ConfigError as error:
            problems = error.problems or (str(error),)
        by_field = problems_by_field(problems)
        for name, editor in self._editors.items():
            editor.show_problem("; ".join(by_field.get(name, ())))
        return list(problems)

    def refresh(self) -> None:
        """Show the draft as it is now."""
        self._version = self._studio.draft.version
        given = self._studio.draft.given
        for editor in self._editors.values():
            editor.show(given)
        self._filter()
        self.check()
        self._changed()

    def _follow(self) -> None:
        """Another tab may have changed the draft."""
        if self._studio.draft.version != self._version:
            self.refresh()

    def _edited(self, field: FormField, value: Any) -> None:
        self._studio.draft.set(field.name, value)
        self._version = self._studio.draft.version
        self.check()
        self._changed()

    def _filter(self) -> None:
        words = self._search.value or ""
        given = self._studio.draft.given
        found = 0
        for group, expansion in self._groups.items():
            names = [field.name for field in form_fields() if field.group == group]
            visible = [
                name
                for name in names
                if self._editors[name].field.matches(words) and (name in given or not self._only_given.value)
            ]
            for name in names:
                self._editors[name].row.set_visibility(name in visible)
            expansion.set_visibility(bool(visible))
            if words or self._only_given.value:
                expansion.set_value(bool(visible))
            found += len(visible)
        self._nothing.set_visibility(found == 0)


class _Editor:
    """One setting: its name, an input, its help, what is wrong with it."""

    def __init__(
        self, studio: Studio, field: FormField, given: Mapping[str, Any], edited: Callable[[FormField, Any], None]
    ) -> None:
        self.field = field
        self._studio = studio
        self._edited = edited
        self._showing = True
        with ui.element("div").classes("setting") as self.row:
            self._input = self._build()
            self._input.props["aria-describedby"] = f"help-{field.name}"
            help = ui.label(field.help).classes("muted small setting-help")
            help.props["id"] = f"help-{field.name}"
            self._problem = ui.label().classes("bad small").props("role=alert")
        self.show(given)

    def show(self, given: Mapping[str, Any]) -> None:
        """Show what the draft says of this setting."""
        self._showing = True
        value = given.get(self.field.name)
        self.row.classes(add="given" if value is not None else "", remove="" if value is not None else "given")
        if self.field.editor == "switch":
            self._input.set_value(_is_true(value if value is not None else self.field.default))
        elif self.field.editor == "choice":
            self._input.set_value(value if value in self.field.choices else self.field.default or None)
        else:
            self._input.set_value(shown_value(value))
        self._showing = False

    def show_problem(self, problem: str) -> None:
        """Say what is wrong with it; nothing for an empty text."""
        self._problem.set_text(shown(problem, 500))
        self._problem.set_visibility(bool(problem))

    def _build(self) -> Any:
        field = self.field
        if field.editor == "switch":
            return ui.switch(field.title, on_change=lambda event: self._take(event.value)).classes("mono")
        if field.editor == "choice":
            choice = ui.select(
                list(field.choices), label=field.title, on_change=lambda event: self._take(event.value)
            ).props("outlined dense options-dense")
            return choice.classes("full mono")
        text = ui.input(field.title, placeholder=field.default)
        text.props("outlined dense stack-label" if field.default else "outlined dense").classes("full mono")
        text.on("blur", lambda: self._typed()).on("keydown.enter", lambda: self._typed())
        if field.editor == "path":
            with text.add_slot("append"):
                ui.button(icon="folder_open", on_click=self._browse).props(
                    f'flat dense round size=sm aria-label="Browse for {field.title}"'
                )
        return text

    def _take(self, value: Any) -> None:
        """From a switch or a choice: the default is not written, so that it stays the default."""
        if self._showing:
            return
        name, given = self.field.name, self._studio.draft.given
        is_default = shown_value(value) == self.field.default
        if is_default and name not in given:
            return
        self._give(None if is_default else value)

    def _typed(self) -> None:
        text = str(self._input.value or "")
        try:
            value = typed_value(self.field, text)
        except ConfigError as error:
            self.show_problem(str(error))
            return
        if shown_value(value) != shown_value(self._studio.draft.given.get(self.field.name)):
            self._give(value)

    def _give(self, value: Any) -> None:
        self.row.classes(add="given" if value is not None else "", remove="" if value is not None else "given")
        self._edited(self.field, value)

    async def _browse(self) -> None:
        chosen = await choose(self._studio, f"Choose {self.field.name}", self._input.value or "")
        if chosen is not None:
            self._input.set_value(str(chosen))
            self._typed()


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes", "on")
