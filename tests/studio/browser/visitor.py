"""What a person does in the Studio, and what they see there."""

from __future__ import annotations

import contextlib
import re
from typing import Any, cast

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Locator, Page, expect

ANSWER = 10_000.0  # ms
PATIENCE = 300_000.0  # ms: other tests may have the machine's cores


class Visitor:
    """One tab."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        page.set_default_timeout(PATIENCE)

    def go(self, path: str) -> None:
        """Open a page of the Studio and wait until it answers."""
        self.page.goto(f"{self.address}{path}")
        self.page.wait_for_selector("main")
        self.page.wait_for_function("() => window.socket && window.socket.connected")

    def press(self, label: str) -> None:
        """Press the button with this name."""
        self.page.get_by_role("button", name=label, exact=True).click()

    def stop(self) -> None:
        """Press Stop, again where the page was loaded anew before it heard: once it has, the button says more."""
        button = self.page.get_by_role("button", name="Stop", exact=True)
        button.wait_for()
        while button.is_visible():
            with contextlib.suppress(PlaywrightError):
                button.click(timeout=ANSWER)
                button.wait_for(state="hidden", timeout=ANSWER)

    def sees(self, text: str) -> None:
        """Wait until this text is there."""
        expect(self.page.get_by_text(text).first).to_be_visible(timeout=PATIENCE)

    def load_demo(self) -> None:
        """Take the demo's pictures as data set."""
        self.go("/data")
        self.press("Use the demo's 40 pictures")
        self.sees("40 samples")

    def set(self, name: str, value: str) -> None:
        """Give a setting on page Train."""
        self.page.get_by_label("Search settings and their help").fill(name)
        field = self.page.locator(f'input[aria-describedby="help-{name}"]')
        field.fill(value)
        field.press("Enter")

    def stage(self, name: str) -> Locator:
        """A stage of the run that is shown."""
        return self.page.locator(f'[data-stage="{name}"]')

    def sees_stage(self, name: str, *states: str) -> None:
        """Wait until the stage is in one of these states."""
        expect(self.stage(name)).to_have_attribute("data-state", re.compile("|".join(states)), timeout=PATIENCE)

    def sees_run(self, state: str) -> None:
        """Wait until the run that is shown is in this state."""
        expect(self.page.locator(".live-run [role=status]")).to_have_text(state, timeout=PATIENCE)

    def log(self) -> str:
        """The run's log as it is shown."""
        return self.page.locator(".run-log").inner_text()

    def losses(self) -> list[list[float]]:
        """The points of the loss curve that is drawn: step and loss."""
        curve = self.page.locator(".loss-chart")
        expect(curve).to_be_visible(timeout=PATIENCE)
        found = curve.evaluate("e => getElement(Number(e.id.slice(1))).chart.getOption().series[0].data")
        return cast(list[list[float]], found)

    def pictures(self, container: str) -> list[Any]:
        """Natural widths of the pictures in a part of the page, once all of them are loaded."""
        images = self.page.locator(f"{container} img")
        expect(images.first).to_be_visible(timeout=PATIENCE)
        self.page.wait_for_function(
            "css => [...document.querySelectorAll(css)].every(e => e.loading == 'lazy' || e.complete)",
            arg=f"{container} img",
        )
        return cast(list[Any], images.evaluate_all("all => all.map(e => e.naturalWidth)"))
