"""A Studio on a folder of its own, and a visitor without a browser (NiceGUI's simulated user)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from nicegui import Client
from nicegui.testing import User, user_simulation
from PIL import Image

from dittocache.studio.access import access_for
from dittocache.studio.app import register
from dittocache.studio.roots import Roots
from dittocache.studio.state import Studio
from dittocache.studio.worker import WorkerThreads

Visit = Callable[[Studio], AbstractAsyncContextManager[User]]


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Tests of pages are coroutines: each runs in a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    """A Studio with one allowed folder, `tmp_path / "root"`, which is the working directory."""
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.chdir(root)
    yield Studio(Roots([root]), access_for("127.0.0.1", 8080), worker=WorkerThreads())


@pytest.fixture
def visit() -> Visit:
    """Serve a Studio to a visitor: `async with visit(studio) as user`."""

    @asynccontextmanager
    async def visiting(studio: Studio) -> AsyncIterator[User]:
        async with user_simulation() as user:
            register(studio)
            try:
                yield user
            finally:
                Client.page_routes.clear()  # else NiceGUI takes the modules of the pages out of sys.modules

    return visiting


@pytest.fixture
def edits(studio: Studio) -> Path:
    """A data set of four edits of two sizes inside the Studio's folder."""
    folder = studio.base / "edits"
    for number in range(4):
        size = (64, 48) if number % 2 else (48, 48)
        for role in ("training_images", "control_images"):
            (folder / role).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (40 * number, 90, 160)).save(folder / role / f"edit-{number}.png")
        (folder / "training_images" / f"edit-{number}.txt").write_text(f"make number {number} blue", encoding="utf-8")
    return folder


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Let the pages work until something is so; fails after `seconds`, which is only reached where it never is."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
