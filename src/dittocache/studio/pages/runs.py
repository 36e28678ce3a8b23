"""Page *Runs*: every run with its state, losses beside each other, going on, deleting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from nicegui import run, ui

from dittocache.errors import DittocacheError
from dittocache.jobs.following.history import RunSummary
from dittocache.jobs.stages import STAGES
from dittocache.studio.layout import card, heading, problems_list
from dittocache.studio.parts.gallery import small_picture
from dittocache.studio.parts.live_run import STATES
from dittocache.studio.parts.loss_comparison import LossComparison
from dittocache.studio.parts.waiting_line import WaitingLine
from dittocache.studio.run_history import CAN_GO_ON, Curves, LossCurves, all_runs, delete_run, folder_bytes, leads
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
        self._curves = LossCurves()
        self._drawn: Curves = {}
        self._runs: list[RunSummary] | None = None
        self._compared: set[str] | None = None
        self._looking = False
        self._facts: dict[str, ui.label] = {}
        with card("Losses compared", "The runs that are ticked below; moving averages.") as self._chart_card:
            self._chart = LossComparison()
        self._chart_card.set_visibility(False)
        WaitingLine()
        with card():
            self._entries = ui.element("div").classes("entries").mark("runs")
            with self._entries:
                ui.label("Looking at the runs …").classes("muted")
        ui.timer(1.5, self._look)

    async def _look(self) -> None:
        if self._looking:
            return
        self._looking = True
        try:
            found = await run.io_bound(all_runs, self._studio)
        except (DittocacheError, OSError) as error:
            self._show_problem(str(error))
            return
        finally:
            self._looking = False
        if found is None or self._entries.is_deleted or found == self._runs:
            return
        changed = _kept(found) != _kept(self._runs)
        self._runs = found
        if self._compared is None:
            self._compared = {one.name for one in [one for one in found if one.step][:COMPARED_AT_FIRST]}
        if changed:  # else a button would vanish under the pointer whenever a run takes a step
            self._list(found)
        for one in found:
            self._facts[one.name].set_text(_facts(one))
        await self._compare()

    def _show_problem(self, problem: str) -> None:
        self._runs = None
        self._entries.clear()
        with self._entries:
            problems_list([problem], "The runs cannot be read")

    def _list(self, runs: list[RunSummary]) -> None:
        self._entries.clear()
        self._facts.clear()
        with self._entries:
            if not runs:
                ui.label("No run yet. Press Train on page Train, or try the demo from page Data.").classes("muted")
            for one in runs:
                self._entry(one)

    def _entry(self, one: RunSummary) -> None:
        name = shown(one.name)
        with ui.element("div").classes("entry") as entry:
            entry.props["data-run"] = name
            box = ui.checkbox(value=one.name in (self._compared or ()), on_change=lambda event: self._tick(one, event))
            box.props["aria-label"] = f"Compare the losses of {name}"
            box.set_enabled(bool(one.step))
            with ui.element("div").classes("grow"):
                with ui.element("div").classes("line"):
                    _link(name, "/train", {"run": one.name}).classes("entry-name")
                    ui.label(STATES[one.state][0]).classes(f"state {one.state}")
                self._facts[one.name] = ui.label(_facts(one)).classes("muted small")
                if one.detail:
                    ui.label(shown(one.detail, 300)).classes("bad small wrap")
                ui.label(shown(one.run_dir, 400)).classes("muted mono small wrap")
            if one.samples:
                with ui.element("div").classes("entry-pictures"):
                    for picture in one.samples:
                        small_picture(picture, 96)
            self._actions(one)

    def _actions(self, one: RunSummary) -> None:
        name = shown(one.name)
        has_lora, has_report = leads(one)
        if one.state in CAN_GO_ON:
            _button("Resume", "play_arrow", lambda: self._resume(one), name)
        if has_lora:
            _link("Use it", "/generate", {"source": one.name}).props(f'aria-label="Make pictures with {name}"')
        if has_report:
            _link("Report", "/reports", {"open": one.name}).props(f'aria-label="Report of {name}"')
        _button("Copy path", "content_copy", lambda: self._copy(one), name)
        if one.state != "running":
            _button("Delete", "delete", lambda: self._delete(one), name)

    async def _tick(self, one: RunSummary, event: Any) -> None:
        if self._compared is None:
            return
        (self._compared.add if event.value else self._compared.discard)(one.name)
        await self._compare()

    async def _compare(self) -> None:
        runs = self._runs or []
        chosen = [one for one in runs if one.name in (self._compared or ())]
        curves = await run.io_bound(self._curves.of, chosen)
        if curves is None or self._entries.is_deleted or curves == self._drawn:
            return
        self._drawn = curves
        self._chart_card.set_visibility(any(one.step for one in runs))
        self._chart.show(curves)

    async def _resume(self, one: RunSummary) -> None:
        try:
            await self._studio.worker.run(resume_run, self._studio, one.run_dir)
        except DittocacheError as error:
            ui.notify(shown(error, 1000), type="negative", multi_line=True)
            return
        ui.navigate.to("/train?" + urlencode({"run": one.name}))

    def _copy(self, one: RunSummary) -> None:
        ui.clipboard.write(str(one.run_dir))
        ui.notify(f"Copied: {shown(one.run_dir)}")

    async def _delete(self, one: RunSummary) -> None:
        size = await run.io_bound(folder_bytes, one.run_dir)
        with ui.dialog() as dialog, ui.card():
            ui.label(f"Delete {shown(one.name)}?").classes("card-title")
            ui.label(
                f"Its folder with {byte_count(size or 0)} goes for good: settings, log, checkpoints, pictures"
                + (", the LoRA." if leads(one)[0] else ".")
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


def _facts(one: RunSummary) -> str:
    """When, how long, how far, in a line."""
    words = [] if one.started is None else [moment(one.started), duration(one.seconds)]
    if one.state == "running" and one.stage in STAGES:
        words.append(STAGES[one.stage].title)
    if one.step is not None:
        words.append(f"step {one.step:,}" + (f" of {one.steps:,}" if one.steps else ""))
    if one.loss is not None:
        words.append(f"loss {one.loss:.4f}")
    return " · ".join(words)


def _kept(runs: list[RunSummary] | None) -> list[tuple[object, ...]] | None:
    """What the list is built from; the line of facts is changed in place."""
    if runs is None:
        return None
    return [(one.name, one.state, one.detail, bool(one.step), one.samples, *leads(one)) for one in runs]


def _button(label: str, icon: str, handler: Callable[[], Any], name: str) -> None:
    ui.button(label, icon=icon, on_click=handler).props(f'flat dense no-caps size=sm aria-label="{label}: {name}"')


def _link(label: str, path: str, query: dict[str, str]) -> ui.link:
    return ui.link(label, f"{path}?{urlencode(query)}")
