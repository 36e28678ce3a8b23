"""Page Train: the form writes the draft, the button lists what is missing, a run is shown from its folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from nicegui import ui
from nicegui.testing import User, UserInteraction
from tests.studio.conftest import Visit, until

from dittocache.errors import ConfigError, StageError
from dittocache.events import EventLog
from dittocache.jobs.queue.folder import FOLDER_VARIABLE, Queue
from dittocache.jobs.run_folder import EVENTS_NAME, LOG_NAME, WORKFLOW, held_folder
from dittocache.studio import training
from dittocache.studio.run_choice import run_to_show
from dittocache.studio.state import Studio

STAGES = ["validate", "cache_latents", "cache_text", "train"]


@pytest.fixture(autouse=True)
def queue_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "queue"))
    monkeypatch.setattr(training, "ensure_runner", lambda queue: False)  # nothing is really started
    return tmp_path / "queue"


def texts(user: User) -> list[str]:
    assert user.client is not None
    return [one.text for one in user.client.elements.values() if isinstance(one, ui.label) and one.visible]


def field(user: User, title: str) -> ui.input:
    assert user.client is not None
    found = [one for one in user.client.elements.values() if isinstance(one, ui.input) and one.props["label"] == title]
    return found[0]


def write_run(folder: Path, steps: int = 30) -> None:
    """A run in the middle of its training, as its stages write it."""
    workflow = EventLog(folder / EVENTS_NAME, WORKFLOW)
    workflow.emit("stage_started", pid=1, command=STAGES, typed="")
    for stage in STAGES[:3]:
        EventLog(folder / EVENTS_NAME, stage).emit("stage_started", pid=1, command=[])
        EventLog(folder / EVENTS_NAME, stage).emit("stage_finished", seconds=2.0)
    train = EventLog(folder / EVENTS_NAME, "train")
    train.emit("stage_started", pid=1, command=[])
    for step in range(1, steps + 1):
        train.emit("metric", step=step, loss=1.0 / step, learning_rate=1e-4)
    train.emit("progress", done=steps, total=100, speed=4.0, eta=17.5)
    (folder / LOG_NAME).write_text("the log of it\n", encoding="utf-8")


async def test_the_button_lists_everything_that_is_missing(studio: Studio, visit: Visit) -> None:
    studio.draft.set("train.steps", "many")
    async with visit(studio) as user:
        await user.open("/train")
        user.find(kind=ui.button, content="Train").click()
        await user.should_see("The training cannot start yet", retries=300)
        said = "\n".join(texts(user))
        assert "train.steps: found 'many'; expected a whole number" in said
        assert "model" in said and "data" in said


async def test_what_is_typed_is_in_the_draft_and_what_is_wrong_stands_beside_it(studio: Studio, visit: Visit) -> None:
    async with visit(studio) as user:
        await user.open("/train")
        steps = field(user, "steps")
        steps.set_value("12")
        _blur(user, steps)
        assert studio.draft.given["train.steps"] == "12"
        steps.set_value("few")
        _blur(user, steps)
        assert any("a whole number" in one for one in texts(user))
        steps.set_value("")
        _blur(user, steps)
        assert "train.steps" not in studio.draft.given


def _blur(user: User, element: ui.input) -> None:
    UserInteraction(user, {element}, None).trigger("blur")


async def test_another_tab_shows_what_was_changed(studio: Studio, visit: Visit) -> None:
    async with visit(studio) as user:
        await user.open("/train")
        studio.draft.update({"train.steps": 77, "train.offload": "group"})
        await until(lambda: field(user, "steps").value == "77")


async def test_search_leaves_what_was_looked_for(studio: Studio, visit: Visit) -> None:
    async with visit(studio) as user:
        await user.open("/train")
        field(user, "Search settings and their help").set_value("warm-up")
        assert user.client is not None
        rows = [one for one in user.client.elements.values() if "setting" in one.classes and one.visible]
        assert 1 <= len(rows) <= 3
        field(user, "Search settings and their help").set_value("no such words")
        await user.should_see("No setting has these words.")


async def test_a_run_is_shown_from_its_folder_and_again_after_a_reload(studio: Studio, visit: Visit) -> None:
    run_dir = studio.base / "runs" / "mine"
    write_run(run_dir)
    async with visit(studio) as user:
        with held_folder(run_dir):
            for _ in range(2):  # the second time is a reload, or another tab
                await user.open("/train")
                await user.should_see("Running", retries=300)
                said = texts(user)
                assert "Training the LoRA" in said and "30 of 100, 4.0 steps/s, 18 s left" in said
                assert "the log of it" in said
                assert user.client is not None
                chart = next(one for one in user.client.elements.values() if isinstance(one, ui.echart))
                assert chart.options["series"][0]["data"][-1] == [30, 1 / 30]
                await user.should_see("Stop")
        await user.should_see("The run is gone", retries=300)  # its process is no more, whatever it said last
        await user.should_see("Resume")


async def test_a_failed_run_says_why_and_how_to_mend_it(studio: Studio, visit: Visit) -> None:
    run_dir = studio.base / "runs" / "mine"
    write_run(run_dir)
    fields = {"error": "CUDA out of memory", "hint": "lower train.batch_size", "returncode": 1}
    EventLog(run_dir / EVENTS_NAME, "train").emit("stage_failed", **fields)
    async with visit(studio) as user:
        await user.open("/train?run=mine")
        await user.should_see("Stage train failed", retries=300)
        assert {"CUDA out of memory", "Hint: lower train.batch_size"} <= set(texts(user))


async def test_a_name_that_leads_outside_shows_no_run(studio: Studio, visit: Visit, tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere")
    assert run_to_show(studio, "../../elsewhere") is None


def test_the_run_at_work_is_shown_first(studio: Studio) -> None:
    write_run(studio.base / "runs" / "old")
    write_run(studio.base / "runs" / "run")
    assert run_to_show(studio) == studio.base / "runs" / "run"  # the draft's own
    with held_folder(studio.base / "runs" / "old"):
        assert run_to_show(studio) == studio.base / "runs" / "old"
        assert run_to_show(studio, showing=studio.base / "runs" / "run") == studio.base / "runs" / "old"
        assert run_to_show(studio, "run") == studio.base / "runs" / "run"


def test_a_training_waits_in_line_once(studio: Studio, edits: Path) -> None:
    studio.draft.update({"data.path": str(edits), "model.path": "bundled", "model.device": "cpu", "name": "mine"})
    run_dir = training.start_training(studio)
    assert run_dir == studio.base / "runs" / "mine"
    assert [(job.run_dir, tuple(job.stages)) for job in Queue().waiting()] == [(run_dir, tuple(STAGES))]
    with pytest.raises(StageError, match="mine waits in line already"):
        training.start_training(studio)
    training.leave_line(training.waiting_jobs()[0].job.number)
    with held_folder(run_dir), pytest.raises(StageError, match="mine is at work already"):
        training.start_training(studio)


def test_nothing_outside_the_roots_is_trained_on(studio: Studio, tmp_path: Path) -> None:
    studio.draft.update({"data.path": str(tmp_path), "model.path": "bundled"})
    with pytest.raises(ConfigError, match="data.path"):
        training.start_training(studio)
    assert Queue().waiting() == []


async def test_the_line_is_shown_and_can_be_left(studio: Studio, visit: Visit, edits: Path) -> None:
    studio.draft.update({"data.path": str(edits), "model.path": "bundled", "model.device": "cpu", "name": "later"})
    training.start_training(studio)
    async with visit(studio) as user:
        await user.open("/train")
        await user.should_see("waits for cpu", retries=300)
        user.find("Leave the line").click()
        await until(lambda: Queue().waiting() == [])
