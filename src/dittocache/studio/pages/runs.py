"""Page *Runs*: every run with its state, losses beside each other, going on, deleting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from nicegui import run, ui

from dittocache.errors import DittocacheError
from dittocache.studio.layout import card, heading, problems_list
from dittocache.studio.parts.live_run import STATES
from dittocache.studio.parts.loss_comparison import LossComparison
from dittocache.studio.run_history import PastRun, RunHistory, delete_run, folder_bytes
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio
from dittocache.studio.training import resume_run
from dittocache.studio.words import byte_count, duration, moment

COMPARED_AT_FIRST = 3


def page(studio: Studio) -> None:
    """Build the page; the runs are looked at after the page is there."""
    heading("Runs", "Everything that was started here or in the terminal, the newest first.")
    _Runs(studio)


class _Runs:
    """The list of runs, and the curves of those that are chosen."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._history = RunHistory(studio)
        self._runs: list[PastRun] | None = None
        self._compared: set[str] | None = None
        self._looking = False
        self._facts: dict[str, ui.label] = {}
        with card("Losses compared", "The runs that are ticked below; moving averages.") as self._chart_card:
            self._chart = LossComparison()
        self._chart_card.set_visibility(False)
        with card():
            self._entries = ui.element("div").classes("entries").mark("runs")
            with self._entries:
                ui.label("Looking at the runs …").classes("muted")
        ui.timer(0, self._look, once=True)
        ui.timer(1.5, self._look)

    async def _look(self) -> None:
        if self._looking:
            return
        self._looking = True
        try:
            found = await run.io_bound(self._history.look)
        except (DittocacheError, OSError) as error:
            self._show_problem(str(error))
            return
        finally:
            self._looking = False
        if found is None or found == self._runs:
            return
        changed = _kept(found) != _kept(self._runs)
        self._runs = found
        if self._compared is None:
            self._compared = {one.name for one in [one for one in found if one.losses][:COMPARED_AT_FIRST]}
        if changed:  # else an open menu would close under the pointer whenever a run takes a step
            self._list(found)
        for one in found:
            self._facts[one.name].set_text(_facts(one))
        self._compare()

    def _show_problem(self, problem: str) -> None:
        self._runs = None
        self._entries.clear()
        with self._entries:
            problems_list([problem], "The runs cannot be read")

    def _list(self, runs: list[PastRun]) -> None:
        self._entries.clear()
        self._facts.clear()
        with self._entries:
            if not runs:
                ui.label("No run yet. Press Train on page Train, or try the demo from page Data.").classes("muted")
            for one in runs:
                self._entry(one)

    def _entry(self, one: PastRun) -> None:
        name = shown(one.name)
        with ui.element("div").classes("entry") as entry:
            entry.props["data-run"] = name
            box = ui.checkbox(value=one.name in (self._compared or ()), on_change=lambda event: self._tick(one, event))
            box.props["aria-label"] = f"Compare the losses of {name}"
            box.set_enabled(bool(one.losses))
            with ui.element("div").classes("grow"):
                with ui.element("div").classes("line"):
                    _link(name, "/train", {"run": one.name}).classes("entry-name")
                    ui.label(STATES[one.state][0]).classes(f"state {one.state}")
                self._facts[one.name] = ui.label(_facts(one)).classes("muted small")
                if one.detail:
                    ui.label(shown(one.detail, 300)).classes("bad small wrap")
                ui.label(shown(one.run_dir, 400)).classes("muted mono small wrap")
            self._actions(one)

    def _actions(self, one: PastRun) -> None:
        name = shown(one.name)
        if one.can_go_on:
            _button("Resume", "play_arrow", lambda: self._resume(one), name)
        if one.has_lora:
            _link("Use it", "/generate", {"source": one.name}).props(f'aria-label="Make pictures with {name}"')
        if one.has_report:
            _link("Report", "/reports", {"open": one.name}).props(f'aria-label="Report of {name}"')
        _button("Copy path", "content_copy", lambda: self._copy(one), name)
        if one.state != "running":
            _button("Delete", "delete", lambda: self._delete(one), name)

    def _tick(self, one: PastRun, event: Any) -> None:
        if self._compared is None:
            return
        (self._compared.add if event.value else self._compared.discard)(one.name)
        self._compare()

    def _compare(self) -> None:
        chosen = [one for one in self._runs or () if one.name in (self._compared or ())]
        self._chart_card.set_visibility(any(one.losses for one in self._runs or ()))
        self._chart.show(chosen)

    async def _resume(self, one: PastRun) -> None:
        try:
            await run.io_bound(resume_run, self._studio, one.run_dir)
        except DittocacheError as error:
            ui.notify(shown(error, 1000), type="negative", multi_line=True)
            return
        ui.navigate.to("/train?" + urlencode({"run": one.name}))

    def _copy(self, one: PastRun) -> None:
        ui.clipboard.write(str(one.run_dir))
        ui.notify(f"Copied: {shown(one.run_dir)}")

    async def _delete(self, one: PastRun) -> None:
        size = await run.io_bound(folder_bytes, one.run_dir)
        with ui.dialog() as dialog, ui.card():
            ui.label(f"Delete {shown(one.name)}?").classes("card-title")
            ui.label(
                f"Its folder with {byte_count(size or 0)} goes for good: settings, log, checkpoints, pictures"
                + (", the LoRA." if one.has_lora else ".")
            )
            ui.label("Cached embeddings stay; page Cache removes what no run uses any more.").classes("muted small")
            with ui.element("div").classes("line end"):
                ui.button("Keep it", on_click=lambda: dialog.submit(False)).props("flat no-caps autofocus")
                ui.button("Delete for good", on_click=lambda: dialog.submit(True)).props(
                    "unelevated no-caps color=negative"
                )
        agreed = await dialog
        dialog.delete()
        if not agreed:
            return
        try:
            await run.io_bound(delete_run, self._studio, one.name)
        except (DittocacheError, OSError) as error:
            ui.notify(shown(error, 500), type="negative", multi_line=True)
        await self._look()


def _facts(one: PastRun) -> str:
    """When, how long, how far, in a line."""
    words = [] if one.started is None else [moment(one.started), duration(one.seconds)]
    if one.state == "running" and one.stage:
        words.append(one.stage)
    if one.losses:
        step, loss = one.losses[-1]
        words.append(f"loss {loss:.4f} at step {step:,}")
    return " · ".join(words)


def _kept(runs: list[PastRun] | None) -> list[tuple[object, ...]] | None:
    """What the list is built from; the line of facts is changed in place."""
    if runs is None:
        return None
    return [(one.name, one.state, one.detail, one.has_lora, one.has_report, bool(one.losses)) for one in runs]


def _button(label: str, icon: str, handler: Callable[[], Any], name: str) -> None:
    ui.button(label, icon=icon, on_click=handler).props(f'flat dense no-caps size=sm aria-label="{label}: {name}"')


def _link(label: str, path: str, query: dict[str, str]) -> ui.link:
    return ui.link(label, f"{path}?{urlencode(query)}")
