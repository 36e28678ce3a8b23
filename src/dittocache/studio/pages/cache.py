"""Page *Cache*: what is cached, what would be encoded and why, how large and how long; verify and clean."""

from __future__ import annotations

from pathlib import Path

from nicegui import run, ui

from dittocache.errors import DittocacheError
from dittocache.jobs.following.view import RunView
from dittocache.jobs.run_folder import is_locked
from dittocache.studio.background_work import Work, background_work
from dittocache.studio.cache_care import CachePlan, cache_place, plan_cache, remove_unused, unused, verify
from dittocache.studio.layout import card, heading, problems_list, telling_errors
from dittocache.studio.parts.live_run import LiveRun
from dittocache.studio.parts.stop_button import stop_button
from dittocache.studio.parts.tables import numbers, row, table
from dittocache.studio.run_choice import run_to_show
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio
from dittocache.studio.training import start_caching
from dittocache.studio.words import byte_count, duration


def page(studio: Studio) -> None:
    """Build the page; the plan is made after the page is there."""
    heading("Cache", "What the encoders make is stored once. Here is what your data needs of it, and why.")
    CachePage(studio)


class CachePage:
    """Plan, caching run, care of the store."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._version = -1
        self._work = background_work(studio)
        with card("Plan") as self._plan_card:
            with ui.element("div").classes("line"):
                self._summary = ui.label().classes("grow wrap").props("aria-live=polite")
                ui.button("Look again", icon="refresh", on_click=self._load).props("flat dense no-caps")
                self._encode = ui.button("Encode what is missing", icon="play_arrow", on_click=self._start)
                self._encode.props("unelevated no-caps")
            self._plan = ui.element("div").classes("stack")
        self._live = LiveRun(self._controls, brief=True)
        with card("Care", "Safe beside runs at work."):
            self._place = ui.label().classes("mono small wrap muted")
            with ui.element("div").classes("line"):
                ui.button("Verify every record", icon="verified", on_click=self._verify).props("outline no-caps")
                ui.button("Remove unused records", icon="cleaning_services", on_click=self._clean).props(
                    "outline no-caps"
                )
            self._progress = ui.linear_progress(0, show_value=False).props("rounded size=6px")
            self._progress.set_visibility(False)
            self._done = ui.label().classes("log mono")
            self._done.set_visibility(False)
        ui.timer(2.0, self._follow)
        ui.timer(0.5, self._show_work)

    async def _follow(self) -> None:
        if self._studio.draft.version != self._version:
            await self._load()
        found = await run.io_bound(run_to_show, self._studio, "", self._live.run_dir)
        if found is not None and is_locked(found):
            await self._live.show(found)

    async def _load(self) -> None:
        self._version = self._studio.draft.version
        self._summary.set_text("Working out what is needed …")
        try:
            self._place.set_text(shown(cache_place(self._studio)))
        except DittocacheError as error:
            self._place.set_text(shown(error))
        plan = await self._studio.worker.run(plan_cache, self._studio)
        if self._plan.is_deleted:
            return
        self._encode.set_enabled(bool(plan.misses))
        self._summary.set_text(_summary(plan))
        self._plan.clear()
        with self._plan:
            _show_plan(plan)

    async def _start(self) -> None:
        with telling_errors():
            await self._live.show(await self._studio.worker.run(start_caching, self._studio))

    def _controls(self, run_dir: Path, view: RunView) -> None:
        if view.state == "running":
            stop_button(run_dir, view)
        elif view.state == "finished":
            ui.timer(0, self._load, once=True)  # what was encoded is in the plan now

    async def _verify(self) -> None:
        if not await self._work.do("Verifying every record", verify):
            _busy()

    async def _clean(self) -> None:
        plan, words = None, ""
        with telling_errors():
            plan, words = await self._studio.worker.run(unused, self._studio)
        if plan is None:
            return
        if not words:
            ui.notify("Every record is used by a run, or younger than an hour: nothing to remove")
            return
        if await _agreed(words) and not await self._work.do("Removing unused records", remove_unused, plan):
            _busy()

    def _show_work(self) -> None:
        """The same in every tab."""
        work = self._work.last
        self._progress.set_visibility(work is not None and work.running)
        self._done.set_visibility(work is not None)
        if work is None:
            return
        work.poll()
        self._progress.set_value(work.done / work.total if work.total else 0)
        self._done.set_text(_work_words(work))


def _busy() -> None:
    ui.notify("Something is being done with the cache already; wait for its end", type="warning")


def _work_words(work: Work) -> str:
    if work.running:
        count = f": {work.done:,.0f} of {work.total:,.0f}, {duration(work.eta)} left" if work.total else ""
        return f"{work.title}{count} …"
    return f"{work.title} failed: {work.problem}" if work.problem else f"{work.title}: done\n{work.text}"


async def _agreed(words: str) -> bool:
    """Whether the user wants removed what the dry run found."""
    with ui.dialog() as dialog, ui.card().classes("chooser"):
        ui.label("Remove unused records?").classes("card-title")
        ui.label("Nothing is removed yet. This is what would go:").classes("muted")
        ui.label(words).classes("log mono")
        with ui.element("div").classes("line end"):
            ui.button("Keep all", on_click=lambda: dialog.submit(False)).props("flat no-caps")
            ui.button("Remove them", on_click=lambda: dialog.submit(True)).props("unelevated no-caps color=negative")
    agreed = await dialog
    dialog.delete()
    return bool(agreed)


def _summary(plan: CachePlan) -> str:
    if plan.problems:
        return "There is no plan yet"
    records = plan.hits + plan.misses
    have = f"{plan.samples:,} samples need {records:,} records; {plan.hits:,} are cached"
    return f"{have}, {plan.misses:,} are to be encoded" if plan.misses else f"{have}: nothing is left to encode"


def _show_plan(plan: CachePlan) -> None:
    if plan.problems:
        problems_list(plan.problems, "Settle this first, on the pages Data, Model and Train")
        return
    share = plan.hits / (plan.hits + plan.misses) if plan.hits + plan.misses else 1.0
    ui.linear_progress(share, show_value=False).props('rounded size=10px aria-label="Share that is cached"')
    numbers(_numbers(plan))
    if not plan.causes:
        return
    with table("Records", "Why they are to be encoded", "For example"):
        for cause in plan.causes:
            examples = ", ".join(shown(name, 60) for name in cause.samples)
            row(f"{cause.records:,}", f"stale: {cause.words}" if cause.stale else cause.words, examples, mono=(0, 2))


def _numbers(plan: CachePlan) -> list[tuple[str, str]]:
    found = [("Cached", byte_count(plan.bytes_stored))]
    if plan.misses:
        size = "not known" if plan.bytes_to_write is None else f"about {byte_count(plan.bytes_to_write)}"
        found.append(("Still to write", size))
    for encoder, seconds in (plan.seconds or {}).items():
        found.append((f"Time, {encoder}", "not measured yet" if seconds is None else f"about {duration(seconds)}"))
    for encoder, count in (plan.to_encode or {}).items():
        found.append(("Plain facts" if encoder == "none" else f"Samples for {encoder}", f"{count:,}"))
    if plan.orphans:
        found.append(("No longer used", f"{plan.orphans:,} records"))
    if plan.removed:
        found.append(("No longer in the data", f"{plan.removed:,} samples"))
    return found
