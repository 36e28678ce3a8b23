"""Browser tests need Chromium: skipped where it is missing, but never on CI."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from tests.studio.browser.serving import chromium, open_browser


@pytest.fixture
def browser() -> Iterator[Browser]:
    if chromium() is None:
        missing = "Chromium is not installed: apt-get install chromium"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(missing)
        pytest.skip(missing)
    with open_browser() as opened:
        yield opened
