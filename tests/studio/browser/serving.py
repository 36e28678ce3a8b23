"""A Studio as its users have it: a process that serves, and Chromium that looks at it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ATTEMPTS = 5  # at a port that is free


def chromium() -> str | None:
    """The installed browser; None where there is none."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name)) is not None), None)


@contextmanager
def running_studio(folder: Path, *options: str) -> Iterator[str]:
    """Serve a Studio whose only folder this is until the block ends; yields its address."""
    process, address = _started(folder, options)
    try:
        yield address
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium without a window."""
    path = chromium()
    assert path is not None, "Chromium is not installed: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_OPTIONS))
        try:
            yield browser
        finally:
            browser.close()


def _started(folder: Path, options: tuple[str, ...]) -> tuple[subprocess.Popen[str], str]:
    said = ""
    for _ in range(ATTEMPTS):
        port = random.randrange(20_000, 60_000)
        process = subprocess.Popen(
            [sys.executable, "-m", "dittocache", "studio", "--no-browser", "--port", str(port), *options],
            cwd=folder,
            env={**os.environ, "DITTOCACHE_QUEUE": str(folder / "queue"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=(folder / "studio.log").open("a"),
            text=True,
        )
        assert process.stdout is not None
        said = process.stdout.readline()  # the address, once it listens; nothing where it ends before
        if said.startswith("Studio: "):
            return process, said.removeprefix("Studio: ").strip().rstrip("/")
        process.wait(30)
    raise AssertionError(f"no Studio could be started: {said} {(folder / 'studio.log').read_text()}")
