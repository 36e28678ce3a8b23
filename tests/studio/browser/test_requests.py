"""Everything that the pages load comes from the Studio, and names that hold markup are shown and not obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, expect
from tests.studio.browser.serving import running_studio
from tests.studio.browser.visitor import PATIENCE, Visitor

from dittocache.config import check_config, save_config
from dittocache.events import EventLog

MARKUP = "<img src=x onerror=alert(1)>"
PAGES = ("/data", "/model", "/cache", "/train", "/generate", "/reports", "/runs")
REPORT = '<!doctype html><title>r</title><script>parent.document.title = "obeyed"</script><p>The report</p>'


@pytest.mark.allow_hosts(["127.0.0.1"])
@pytest.mark.timeout(600)
def test_no_request_leaves_the_machine_and_no_markup_is_obeyed(browser: Browser, tmp_path: Path) -> None:
    data = _data_set(tmp_path)
    run = _run(tmp_path, data)
    _draft(tmp_path, data)
    context = browser.new_context()
    hosts: set[str] = set()
    said: list[str] = []
    context.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    context.on("page", lambda page: page.on("websocket", lambda socket: hosts.add(urlsplit(socket.url).netloc)))
    context.on("console", lambda message: _hear(message, said))
    context.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    with running_studio(tmp_path) as address:
        visitor = Visitor(context.new_page(), address)
        for path in PAGES:
            visitor.go(path)
            visitor.page.wait_for_load_state("networkidle")
            if path == "/data":
                visitor.sees(f"edit {MARKUP}")
            if path == "/generate":
                expect(visitor.page.locator(".comparison figure")).to_have_count(2, timeout=PATIENCE)
            if path == "/runs":
                visitor.sees(run.name)
        visitor.go(f"/reports?open={quote(run.name)}")
        frame = visitor.page.frame_locator("iframe.report-frame")
        expect(frame.get_by_text("The report")).to_be_visible(timeout=PATIENCE)
        assert visitor.page.title() == "Reports · dittocache Studio"
        own = urlsplit(address).netloc
    assert hosts - {""} == {own}  # data: and blob: have none
    assert not said


def _hear(message: ConsoleMessage, said: list[str]) -> None:
    """Errors in the console tell of blocked requests; that of the report's script is as it should be."""
    if message.type == "error" and "/report?" not in message.text and "sandboxed" not in message.text:
        said.append(message.text)


def _data_set(folder: Path) -> Path:
    data = folder / "data"
    for part in ("training_images", "control_images"):
        (data / part).mkdir(parents=True)
        Image.new("RGB", (64, 64), "teal").save(data / part / f"{MARKUP}.png")
    (data / "training_images" / f"{MARKUP}.txt").write_text(f"edit {MARKUP}")
    return data


def _run(folder: Path, data: Path) -> Path:
    """A finished run with everything that a page may show of it, and a picture that was made of it."""
    run = folder / "runs" / f"run {MARKUP}"
    settings = check_config({"model": {"path": "bundled"}, "data": {"path": str(data)}})
    for place, stage in ((run, "train"), (folder / "runs" / "pictures" / "20260101-000000", "picture")):
        save_config(settings, place / "config.yaml")
        (place / "samples").mkdir()
        for name in ("uncached.png", "cached.png"):
            Image.new("RGB", (64, 64), "navy").save(place / "samples" / name)
        workflow, log = (EventLog(place / "events.jsonl", name) for name in ("workflow", stage))
        workflow.emit("stage_started", pid=1, command=[stage])
        log.emit("stage_started", pid=1, command=[])
        log.message(f"message {MARKUP}")
        for step in range(1, 4):
            log.emit("metric", step=step, loss=1.0 / step)
        log.emit("result", compared=[{"name": "x", "caption": MARKUP, "source": None, "variants": _variants()}])
        log.emit("stage_finished", seconds=1.0)
        workflow.emit("stage_finished", seconds=1.0)
        (place / "log.txt").write_text(f"log {MARKUP}\n")
    (run / "lora").mkdir()
    (run / "report.html").write_text(REPORT)
    return run


def _variants() -> list[dict[str, Any]]:
    one = {"settings": MARKUP, "seconds": 1.0, "bytes_held": 10, "notes": [MARKUP]}
    return [
        {
            **one,
            "label": f"{role} {MARKUP}",
            "role": role,
            "picture": f"samples/{role}.png",
            "patterns": {MARKUP: marks},
        }
        for role, marks in (("uncached", ["computed"] * 2), ("cached", ["computed", "skipped"]))
    ]


def _draft(folder: Path, data: Path) -> None:
    home = folder / ".dittocache-studio"
    home.mkdir()
    (home / "draft.json").write_text(json.dumps({"data.path": str(data), "model.path": "bundled"}))
