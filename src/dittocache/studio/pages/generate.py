"""Page *Generate*: one picture of a model, without and with the caches, made by a job of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicegui import events, run, ui

from dittocache.data.pictures import ENDINGS
from dittocache.errors import ConfigError, DittocacheError
from dittocache.studio.examples import UPLOADS_NAME, pick_example
from dittocache.studio.layout import card, heading, problems_list
from dittocache.studio.parts.chooser import choose
from dittocache.studio.parts.made_pictures import MadePictures
from dittocache.studio.parts.waiting_line import WaitingLine
from dittocache.studio.picture_request import (
    CACHES,
    DIALS,
    GATES,
    STAGES,
    chosen_source,
    request_of,
    requested_config,
    source_config,
    sources,
)
from dittocache.studio.shown import shown
from dittocache.studio.state import Studio
from dittocache.studio.thumbnails import thumbnail_url
from dittocache.studio.training import line_up
from dittocache.studio.uploads import MAX_UPLOAD_BYTES, keep_picture


def page(studio: Studio) -> None:
    """Build the page; `?source=NAME` chooses the model of that run."""
    heading("Generate", "Make a picture, and see what the caches save and what they change.")
    request = ui.context.client.request
    if request is not None and (asked := request.query_params.get("source")):
        request_of(studio).set("source", asked)
    with ui.element("div").classes("columns"):
        form = _Form(studio)
        with ui.element("div").classes("stack"):
            WaitingLine()
            with card("Result"):
                made = MadePictures(studio)
    form.started = made.show


class _Form:
    """What to make. Everything typed is kept at once, so that a reload and another tab show the same."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._request = request_of(studio)
        self._version = self._request.version
        self.started: Callable[[Path], None] = lambda run_dir: None
        with card():
            self._parts = ui.element("div").classes("stack")
            self._problems = ui.element("div").classes("stack")
            self._button = ui.button("Make the picture", icon="auto_awesome", on_click=self._start)
            self._button.props("unelevated no-caps size=lg").classes("full").mark("generate-button")
        self._build()
        ui.timer(2.0, self._follow)

    def _follow(self) -> None:
        if self._request.version != self._version:
            self._build()

    def _give(self, name: str, value: Any) -> None:
        self._request.set(name, value)
        self._version = self._request.version

    def _give_and_build(self, name: str, value: Any) -> None:
        self._give(name, value)
        self._build()

    def _build(self) -> None:
        self._version = self._request.version
        given = self._request.given
        self._parts.clear()
        self._problems.clear()
        with self._parts:
            self._model(given)
            self._pictures(given)
            prompt = ui.textarea("Prompt", value=given.get("generate.prompt", ""))
            prompt.props("outlined autogrow debounce=300").classes("full").mark("prompt")
            prompt.on_value_change(lambda event: self._give("generate.prompt", event.value or None))
            self._numbers(given)
            self._caches(given)

    def _model(self, given: dict[str, Any]) -> None:
        source = chosen_source(self._studio, given)
        titles = {one.run: shown(one.title) for one in sources(self._studio)}
        ui.select(
            titles, label="Model", value=source.run, on_change=lambda event: self._give_and_build("source", event.value)
        ).props("outlined dense options-dense").classes("full").mark("source")
        if source.lora:
            ui.switch(
                "Use its LoRA",
                value=given.get("use_lora", True),
                on_change=lambda event: self._give("use_lora", event.value),
            )

    def _pictures(self, given: dict[str, Any]) -> None:
        images = given.get("generate.image") or []
        with ui.element("div").classes("chosen-pictures"):
            for image in images:
                with ui.element("div").classes("chosen-picture"):
                    picture = ui.element("img")
                    picture.props["src"] = thumbnail_url(Path(image), 256)
                    picture.props["alt"] = shown(Path(image).name)
                    ui.button(icon="close", on_click=lambda image=image: self._take_away(image)).props(
                        'round dense size=sm aria-label="Take the picture away"'
                    )
        with ui.element("div").classes("line"):
            ui.button("Choose a picture", icon="folder_open", on_click=self._choose).props("outline dense no-caps")
            ui.button("Take one of the data set", icon="casino", on_click=self._example).props(
                "outline dense no-caps"
            ).mark("example")
        ui.upload(
            label="Or drop pictures here",
            multiple=True,
            auto_upload=True,
            max_file_size=MAX_UPLOAD_BYTES,
            on_upload=self._uploaded,
            on_rejected=lambda: ui.notify(f"Pictures of at most {MAX_UPLOAD_BYTES // 2**20} MiB are taken"),
        ).props(f'flat accept="{",".join(sorted(ENDINGS))}"').classes("studio-upload")

    def _numbers(self, given: dict[str, Any]) -> None:
        with ui.element("div").classes("number-fields"):
            self._number(given, "Steps", "generate.num_inference_steps", "usual", 1)
            self._number(given, "Seed", "generate.seed", "0", 0)
            self._number(given, "Guidance", "generate.true_cfg_scale", "1 (off)", 0, step=0.5)
        with ui.expansion("More settings").classes("settings-group"), ui.element("div").classes("stack"):
            with ui.element("div").classes("number-fields"):
                self._number(given, "Width", "generate.width", "as the picture", 1, step=16)
                self._number(given, "Height", "generate.height", "as the picture", 1, step=16)
                self._number(given, "Distilled guidance", "generate.guidance_scale", "usual", 0, step=0.5)
            negative = ui.input("Negative prompt, where guidance is above 1")
            negative.set_value(given.get("generate.negative_prompt", ""))
            negative.props("outlined dense debounce=300").classes("full")
            negative.on_value_change(lambda event: self._give("generate.negative_prompt", event.value or None))

    def _number(
        self, given: dict[str, Any], label: str, name: str, placeholder: str, least: float, step: float = 1
    ) -> None:
        field = ui.number(label, value=given.get(name), placeholder=placeholder, min=least, step=step)
        field.props("outlined dense stack-label debounce=300")
        field.on_value_change(lambda event: self._give(name, _plain(event.value)))

    def _caches(self, given: dict[str, Any]) -> None:
        caches = given.get("caches", "both")
        ui.toggle(CACHES, value=caches, on_change=lambda event: self._give_and_build("caches", event.value)).props(
            'no-caps unelevated spread aria-label="Caches"'
        ).classes("full").mark("caches")
        if caches == "off":
            return
        try:
            config = source_config(self._studio, chosen_source(self._studio, given))
        except DittocacheError:
            config = None  # told when the picture is asked for
        ui.switch(
            "Step cache: skip steps that change little",
            value=given.get("step_cache", True),
            on_change=lambda event: self._give_and_build("step_cache", event.value),
        ).mark("step-cache")
        if given.get("step_cache", True):
            own = config.teacache.gate if config is not None and config.teacache is not None else "error"
            gate = given.get("gate", own)
            ui.select(
                GATES if gate in GATES else {**GATES, gate: "by the run's own schedule"},
                label="Steps are skipped",
                value=gate,
                on_change=lambda event: self._give_and_build("gate", event.value),
            ).props("outlined dense options-dense").classes("full")
            if gate in DIALS:
                usual = getattr(config.teacache, DIALS[gate], None) if config is not None else None
                label = "Tolerance: larger skips more" if gate == "error" else "Threshold: larger skips more"
                self._number(given, label, DIALS[gate], str(usual or ""), 0, step=0.001 if gate == "error" else 0.05)
        ui.switch(
            "Reference cache: keep what the given pictures contribute",
            value=given.get("reference_cache", True),
            on_change=lambda event: self._give_and_build("reference_cache", event.value),
        ).mark("reference-cache")
        if given.get("reference_cache", True):
            kept = config.reference_kv.refresh if config is not None and config.reference_kv is not None else 0
            kept = kept if isinstance(kept, int) else 0  # steps by name, or adaptive: left as the run has them
            self._number(given, "Computed anew every … steps (0: as suits)", "refresh", str(kept), 0)

    def _take_away(self, image: str) -> None:
        images = [one for one in self._request.given.get("generate.image") or [] if one != image]
        self._give_and_build("generate.image", images or None)

    def _add(self, path: Path) -> None:
        images = self._request.given.get("generate.image") or []
        self._give_and_build("generate.image", list(dict.fromkeys([*images, str(path)])))

    async def _choose(self) -> None:
        images = self._request.given.get("generate.image") or [""]
        chosen = await choose(self._studio, "Choose a picture", images[-1], ENDINGS, folders=False)
        if chosen is not None:
            self._add(chosen)

    async def _uploaded(self, event: events.UploadEventArguments) -> None:
        self._problems.clear()
        try:
            content = await event.file.read()
            self._add(await run.io_bound(keep_picture, content, event.file.name, self._studio.home / UPLOADS_NAME))
        except (DittocacheError, OSError) as error:
            with self._problems:
                problems_list([str(error)], "The picture was not taken")

    async def _example(self) -> None:
        """Ask for an edit that the model was not trained on, where a set is held out; else one of the data set."""
        try:
            example = await self._studio.worker.run(pick_example, self._studio, self._request.given)
        except (DittocacheError, OSError) as error:
            ui.notify(f"There is none to take: {shown(error, 500)}", type="warning", multi_line=True)
            return
        images = [str(image) for image in example.images]
        self._request.update({"generate.prompt": example.prompt, "generate.image": images})
        if not self._parts.is_deleted:
            self._build()

    async def _start(self) -> None:
        self._problems.clear()
        try:
            config = requested_config(self._studio, self._request.given)
            folder = await self._studio.worker.run(line_up, config, STAGES)
        except DittocacheError as error:
            with self._problems:
                problems = error.problems if isinstance(error, ConfigError) else ()
                problems_list(problems or [str(error)], "The picture cannot be made yet")
            return
        self.started(folder)


def _plain(value: float | None) -> float | int | None:
    """A number as it was typed: 4, not 4.0."""
    return int(value) if value is not None and float(value).is_integer() else value
