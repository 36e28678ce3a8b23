"""A visitor goes from the demo's pictures to a LoRA and to pictures made with it, and closes the tab on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from tests.studio.browser.serving import running_studio
from tests.studio.browser.visitor import PATIENCE, Visitor

STEPS = 150  # long enough to be stopped on the way, also by a browser that is slow
SETTINGS = {
    "train.steps": str(STEPS),
    "train.batch_size": "1",
    "train.checkpoint_every": "10",
    "train.validate_every": str(STEPS // 2),
    "train.validation_pictures": "1",
    "generate.num_inference_steps": "6",
}
KEPT = 4  # of the demo's 40 samples, so that encoding takes a moment only
STAGES = ("validate", "cache_latents", "cache_text", "train")


@pytest.mark.allow_hosts(["127.0.0.1"])
@pytest.mark.timeout(1200)
def test_from_pictures_to_a_lora_and_its_pictures(browser: Browser, tmp_path: Path) -> None:
    with running_studio(tmp_path) as address:
        first = Visitor(browser.new_page(), address)
        first.load_demo()
        _keep_some(tmp_path / "demo-pictures" / "train")
        first.press("Look again")
        first.sees(f"{KEPT} samples")

        first.go("/train")
        for name, value in SETTINGS.items():
            first.set(name, value)
        first.press("Train")
        for stage in STAGES[:3]:
            first.sees_stage(stage, "finished", "reused")
        first.sees_stage("train", "running")
        seen_log, seen_losses = first.log(), first.losses()
        first.page.close()

        second = Visitor(browser.new_page(), address)
        second.go("/train")
        second.sees_run("Running")
        assert second.log().startswith(seen_log)
        assert second.losses()[: len(seen_losses)] == seen_losses
        second.stop()
        second.sees_run("Stopped")
        second.sees_stage("train", "stopped")
        done = second.losses()
        assert 0 < len(done) < STEPS

        third = Visitor(browser.new_page(), address)
        third.go("/train")
        third.sees_run("Stopped")
        assert third.losses() == done, "two tabs show the same"
        third.press("Resume")
        third.sees_run("Finished")
        second.sees_run("Finished")
        for visitor in (second, third):
            expect(visitor.page.locator(".live-run .tile")).to_have_count(2, timeout=PATIENCE)  # half-way, at the end
            assert all(width > 0 for width in visitor.pictures(".live-run"))
            losses = visitor.losses()
            assert [step for step, _ in losses] == list(range(1, STEPS + 1)), "no step is lost, none is there twice"
            assert losses[: len(done)] == done

        _make_a_picture(third)
        third.go("/runs")
        third.sees("Finished")


def _make_a_picture(visitor: Visitor) -> None:
    """With the LoRA, of a picture that is held out, without and with the caches."""
    visitor.go("/generate")
    visitor.press("Take one of the data set")
    expect(visitor.page.locator(".chosen-picture")).to_have_count(1, timeout=PATIENCE)
    visitor.press("Make the picture")
    figures = visitor.page.locator(".comparison figure")
    expect(figures).to_have_count(3, timeout=PATIENCE)  # given, uncached, cached
    visitor.sees("Done")
    assert visitor.pictures(".comparison") == [128, 128, 128]
    cached = figures.nth(2)
    expect(cached).to_contain_text("as fast")
    expect(cached).to_contain_text("PSNR")
    assert cached.locator(".strip .mark").count() == 6
    visitor.page.reload()
    expect(figures).to_have_count(3, timeout=PATIENCE)


def _keep_some(folder: Path) -> None:
    """Take samples away, as one would in a file manager."""
    for part in ("training_images", "control_images"):
        for file in (folder / part).iterdir():
            if int(file.stem.rpartition("-")[2]) >= KEPT:
                file.unlink()
