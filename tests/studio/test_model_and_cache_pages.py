"""Pages Model and Cache: what is said of a checkpoint, of the plan, and how the cache is looked after."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path

import pytest
from nicegui import ui
from nicegui.testing import User
from tests.studio.conftest import Visit, until

from dittocache.demo.model import MODEL_DIR
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError
from dittocache.events import EventLog
from dittocache.jobs.caching import cache_latents, cache_text
from dittocache.jobs.inputs import RunInputs
from dittocache.studio.background_work import background_work
from dittocache.studio.cache_care import plan_cache, remove_unused, unused, verify
from dittocache.studio.model_check import check_model
from dittocache.studio.state import Studio

SMALL = {"data.resolution": 64, "data.condition_resolution": 64, "model.dtype": "float32", "model.device": "cpu"}


def texts(user: User) -> list[str]:
    assert user.client is not None
    return [one.text for one in user.client.elements.values() if isinstance(one, ui.label) and one.visible]


def test_the_bundled_model_is_complete(studio: Studio) -> None:
    studio.draft.update({"model.path": "bundled", "model.device": "cpu"})
    found = check_model(studio)
    assert found is not None and found.problems == ()
    assert (found.family, found.pipeline, found.device) == ("qwen-image-edit-plus", "QwenImageEditPlusPipeline", "cpu")
    weights = {part.name: part.weight_bytes for part in found.components}
    assert weights["transformer"] > weights["vae"] > 0


def test_what_is_missing_of_a_model_is_said_in_words(studio: Studio) -> None:
    folder = studio.base / "model"
    shutil.copytree(MODEL_DIR, folder)
    shutil.rmtree(folder / "vae")
    for file in (folder / "text_encoder").glob("*.safetensors"):
        file.unlink()
    studio.draft.update({"model.path": str(folder), "model.device": "cuda:9"})
    found = check_model(studio)
    assert found is not None
    said = "\n".join(found.problems)
    assert "lists the component 'vae', but its folder is missing or empty" in said
    assert "text_encoder holds no weights" in said
    assert "model.device: 'cuda:9' is not there" in said


@pytest.mark.parametrize("path", ["words", "/nowhere/at/all", "../elsewhere"])
def test_what_is_no_model_is_told(studio: Studio, path: str) -> None:
    (studio.base / "words").mkdir()
    (studio.base / "words" / "readme.txt").write_text("a folder of text")
    studio.draft.set("model.path", path)
    found = check_model(studio)
    assert found is not None and found.problems and found.problems[0].startswith("model.path")


async def test_the_model_page_shows_the_parts(studio: Studio, visit: Visit) -> None:
    studio.draft.update({"model.path": "bundled", "model.device": "cpu"})
    async with visit(studio) as user:
        await user.open("/model")
        await user.should_see("Complete: qwen-image-edit-plus, runs on cpu", retries=300)
        assert {"transformer", "vae", "text_encoder"} <= set(texts(user))


def test_the_plan_says_what_and_why(studio: Studio, edits: Path) -> None:
    studio.draft.update({**SMALL, "data.path": str(edits), "model.path": "bundled"})
    config = studio.config()
    first = plan_cache(studio)
    assert first.problems == () and first.hits == 0 and first.misses > 8 and first.samples == 4
    assert first.to_encode is not None and first.to_encode["vae"] == first.to_encode["text_encoder"] == 4
    assert [cause.words for cause in first.causes] == ["new"] and first.bytes_to_write
    log = EventLog(config.run_dir / "events.jsonl", "cache")
    cache_latents(RunInputs(config, config.run_dir), log)
    cache_text(RunInputs(config, config.run_dir), log)
    assert plan_cache(studio).misses == 0
    (edits / "training_images" / "edit-1.txt").write_text("make it green")
    stale = plan_cache(studio)
    assert [(cause.words, cause.stale) for cause in stale.causes] == [("caption changed", True)]
    assert stale.causes[0].samples == ("edit-1",)

    assert "all are as written" in verify(studio, log)
    plan, words = unused(studio)
    assert words == "" or "unused" in words  # all are younger than an hour, or used
    assert remove_unused(studio, log, plan)
    assert Store(studio.base / "cache").root.is_dir() and plan_cache(studio).hits == stale.hits


async def test_unused_records_go_only_when_that_is_agreed_to(studio: Studio, visit: Visit, edits: Path) -> None:
    studio.draft.update({**SMALL, "data.path": str(edits), "model.path": "bundled"})
    config = studio.config()
    cache_latents(RunInputs(config, config.run_dir), EventLog(config.run_dir / "events.jsonl", "cache"))
    shutil.rmtree(config.run_dir)
    shutil.rmtree(studio.base / "cache" / "roots")  # of a run that was at work this hour, or they would stay
    hours_ago = time.time() - 3 * 3600
    for file in (studio.base / "cache").rglob("*"):
        os.utime(file, (hours_ago, hours_ago))
    before = set(Store(studio.base / "cache").keys())
    async with visit(studio) as user:
        await user.open("/cache")
        for answer, left in (("Keep all", before), ("Remove them", set())):
            user.find("Remove unused records").click()
            await user.should_see(f"{len(before)} records", retries=300)  # the dry run
            user.find(kind=ui.button, content=answer).click()
            if not left:
                await user.should_see("Removing unused records: done", retries=300)
            assert set(Store(studio.base / "cache").keys()) == left


def test_without_a_cache_there_is_nothing_to_verify(studio: Studio, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="there is no cache"):
        verify(studio, EventLog(tmp_path / "events.jsonl", "verify"))


async def test_the_cache_page_shows_plan_and_work(studio: Studio, visit: Visit, edits: Path) -> None:
    studio.draft.update({**SMALL, "data.path": str(edits), "model.path": "bundled"})
    async with visit(studio) as user:
        await user.open("/cache")
        await user.should_see("4 samples need", retries=300)
        assert {"new", "Samples for vae"} <= set(texts(user))
        user.find("Verify every record").click()
        await until(lambda: any("Verifying every record: done" in one for one in texts(user)))
        await user.open("/cache")  # another tab shows the same
        await until(lambda: any("Verifying every record: done" in one for one in texts(user)))


async def test_one_thing_is_done_with_the_cache_at_a_time(studio: Studio) -> None:
    work = background_work(studio)

    def first(studio: Studio, log: EventLog) -> str:
        log.emit("progress", done=3, total=4, speed=1.0, eta=1.0)
        return "found it"

    assert await asyncio.gather(work.do("first", first), work.do("second", first)) == [True, False]
    assert work.last is not None
    assert (work.last.title, work.last.text, work.last.done, work.last.running) == ("first", "found it", 3, False)


async def test_the_plan_page_says_what_is_to_be_settled_first(studio: Studio, visit: Visit) -> None:
    async with visit(studio) as user:
        await user.open("/cache")
        await user.should_see("Settle this first", retries=300)
