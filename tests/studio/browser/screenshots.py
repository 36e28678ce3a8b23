"""Pictures of every page of the Studio for the docs: `make screenshots`.

A Studio in a folder of its own trains the demo's LoRA, makes a picture with it and writes a report; then every page is
taken at the width of a desk and of a phone, some in dark.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect
from tests.studio.browser.serving import open_browser, running_studio
from tests.studio.browser.visitor import PATIENCE, Visitor

import dittocache

DESK, PHONE = (1440, 900), (390, 844)
DARK = {("train", DESK), ("generate", PHONE)}
PAGES = ("data", "model", "cache", "train", "generate", "reports", "runs")
COLOURS = 128  # of the files: the pages have few, and the docs stay small
PACKAGE = Path(dittocache.__file__).parent
COMPARED_RUN = "demo-lower-rate"

log = logging.getLogger("screenshots")


def main() -> None:
    """Make the pictures; with `--keep FOLDER` what was trained there is kept, and used again the next time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--keep", type=Path, help="folder of the Studio; a temporary one when left out")
    parser.add_argument("--steps", type=int, default=100, help="of the training")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="studio-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with running_studio(folder.resolve()) as address, open_browser() as browser:
            _prepare(browser, address, folder, options.steps)
            for name in PAGES:
                for size in (DESK, PHONE):
                    _take(browser, address, folder, name, size, options.out)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _prepare(browser: Browser, address: str, folder: Path, steps: int) -> None:
    """Train twice, make a picture, write a report; each only where it is not there yet."""
    visitor = Visitor(browser.new_page(), address)
    if not (folder / "demo-pictures").is_dir():
        visitor.load_demo()
    if not (folder / "runs" / "demo" / "lora").is_dir():
        for name, rate in ((COMPARED_RUN, "0.0005"), ("demo", "0.002")):
            visitor.go("/train")
            settings = {"name": name, "train.learning_rate": rate, "train.steps": str(steps)}
            for setting, value in {**settings, "train.validate_every": str(steps // 2)}.items():
                visitor.set(setting, value)
            log.info("training %s", name)
            visitor.press("Train")
            visitor.sees_stage("train", "running")
            visitor.sees_run("Finished")
    if not (folder / "runs" / "pictures").is_dir():
        log.info("making a picture")
        visitor.go("/generate?source=demo")
        visitor.press("Take one of the data set")
        expect(visitor.page.locator(".chosen-picture")).to_have_count(1, timeout=PATIENCE)
        visitor.press("Make the picture")
        visitor.sees("Done")
    if not (folder / "runs" / "demo" / "report.html").is_file():
        log.info("writing the report")
        visitor.go("/reports")
        visitor.page.get_by_role("button", name="Write a report: demo", exact=True).click()
        expect(visitor.page.locator("iframe.report-frame")).to_be_visible(timeout=PATIENCE)
    _forget_places(folder)
    visitor.page.close()


def _forget_places(folder: Path) -> None:
    """Relative paths, as a user would type them: the docs need not show where this was made."""
    draft = folder / ".dittocache-studio" / "draft.json"
    settings = json.loads(draft.read_text(encoding="utf-8"))
    for name in ("data.path", "held_out"):
        if name in settings and Path(settings[name]).is_relative_to(folder.resolve()):
            settings[name] = str(Path(settings[name]).relative_to(folder.resolve()))
    draft.write_text(json.dumps(settings), encoding="utf-8")


def _take(browser: Browser, address: str, folder: Path, name: str, size: tuple[int, int], out: Path) -> None:
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce")
    if (name, size) in DARK:
        context.add_cookies([{"name": "studio-theme", "value": "dark", "url": address}])
    visitor = Visitor(context.new_page(), address)
    visitor.page.set_default_timeout(60_000)
    # Of the other run nothing was made after its training: all stages are there.
    shown = {"reports": "?open=demo", "train": f"?run={COMPARED_RUN}"}
    visitor.go(f"/{name}{shown.get(name, '')}")
    _settle(visitor.page, name)
    _hide_places(visitor.page, folder)
    file = out / f"studio-{name}-{width}.png"
    _save(visitor.page.screenshot(), file)
    context.close()
    log.info("%s", file)


def _settle(page: Page, name: str) -> None:
    """Wait for what comes after the page: pictures, plans, curves."""
    awaited = {
        "data": ".tile img",
        "model": "table",
        "train": ".loss-chart canvas",
        "generate": ".comparison figure",
        "reports": "iframe.report-frame",
        "runs": ".chart canvas",
    }
    if name in awaited:
        page.locator(awaited[name]).first.wait_for()
    page.wait_for_timeout(1500)  # charts draw, estimates come
    page.wait_for_function(
        "() => [...document.querySelectorAll('[aria-live]')].every(e => !e.innerText.endsWith('…'))"
        " && [...document.images].every(e => e.loading == 'lazy' || e.complete)"
    )


def _hide_places(page: Page, folder: Path) -> None:
    """Show common places instead of those of the machine where this was made."""
    places = {str(folder.resolve()): "/home/me/studio", str(PACKAGE.resolve()): "/opt/dittocache"}
    page.evaluate(
        """places => {
            const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (texts.nextNode())
                for (const [found, shown] of Object.entries(places))
                    texts.currentNode.data = texts.currentNode.data.replaceAll(found, shown);
        }""",
        places,
    )


def _save(content: bytes, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(content)) as picture:
        small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        small.save(file, optimize=True)


if __name__ == "__main__":
    main()
