"""Ten thousand samples do not stall page Data: what it does is counted, because time depends on the machine."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nicegui import ui
from nicegui.testing import User
from PIL import Image
from tests.studio.conftest import Visit

from dittocache.data import digests
from dittocache.studio.parts.gallery import A_PAGE
from dittocache.studio.state import Studio

SAMPLES = 10_000
OPENED_FOR_EACH = 3  # the picture for its header and for where its EXIF stands, the caption
RETRIES = 3000  # of 0.1 s: how long reading may take on a machine that is busy


class Opened:
    """Counts the files of a folder that this process opens."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.count = 0

    def note(self, file: Any) -> None:
        self.count += isinstance(file, str | os.PathLike) and os.fspath(file).startswith(self.folder)


@pytest.fixture
def large_set(studio: Studio) -> Path:
    """Links to one picture and one caption: what is in the files does not matter here."""
    folder = studio.base / "large"
    folder.mkdir()
    Image.new("RGB", (64, 64), "teal").save(studio.base / "one.png")
    (studio.base / "one.txt").write_text("a teal square")
    for number in range(SAMPLES):
        for ending in (".png", ".txt"):
            os.link(studio.base / f"one{ending}", folder / f"sample-{number:05}{ending}")
    return folder


@pytest.fixture
def opened(large_set: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    # What was written this moment is read again, lest a change be missed; these files are meant to be old.
    monkeypatch.setattr(digests, "GRANULARITY_NS", 0)
    counter = Opened(large_set)
    for module in (builtins, io):
        original = module.open

        def counted(file: Any, *more: Any, _original: Any = original, **options: Any) -> Any:
            counter.note(file)
            return _original(file, *more, **options)

        monkeypatch.setattr(module, "open", counted)
    original_open = os.open

    def counted_descriptor(file: Any, *more: Any, **options: Any) -> int:
        counter.note(file)
        return original_open(file, *more, **options)

    monkeypatch.setattr(os, "open", counted_descriptor)
    yield counter


def _tiles(user: User) -> int:
    with user:
        assert user.client is not None
        return sum("tile" in element.classes for element in user.client.elements.values())


@pytest.mark.timeout(400)
async def test_each_file_is_opened_once_and_only_a_page_of_samples_is_built(
    studio: Studio, visit: Visit, large_set: Path, opened: Opened
) -> None:
    studio.draft.update({"data.path": str(large_set), "data.resolution": 64})
    async with visit(studio) as user:
        await user.open("/data")
        assert opened.count == 0, "the page is sent before the set is looked at"
        await user.should_see(f"{SAMPLES:,} samples · nothing wrong", retries=RETRIES)
        assert _tiles(user) == A_PAGE
        first = opened.count
        assert first <= OPENED_FOR_EACH * SAMPLES, "each file is read once"

        user.find(kind=ui.pagination).elements.pop().set_value(5)
        assert _tiles(user) == A_PAGE
        assert opened.count == first, "another page of samples opens nothing"

        await user.open("/data")
        await user.should_see(f"{SAMPLES:,} samples · nothing wrong", retries=RETRIES)
        assert opened.count == first, "what was read is remembered"
