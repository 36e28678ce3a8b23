"""What page Generate asks for: which settings the job gets, which caches, and what is refused before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dittocache.config import RunConfig, check_config, save_config
from dittocache.errors import AccessError, ConfigError
from dittocache.jobs.run_folder import EVENTS_NAME
from dittocache.studio.picture_request import (
    chosen_source,
    made_pictures,
    request_of,
    requested_config,
    sources,
)
from dittocache.studio.state import Studio


def _run(studio: Studio, name: str, lora: bool = True, **settings: Any) -> Path:
    """A run as training leaves it."""
    data = studio.base / "data"
    data.mkdir(exist_ok=True)
    config = check_config(
        {"name": name, "model": {"path": "bundled"}, "data": {"path": str(data)}, "output_dir": "runs"}, settings
    )
    folder = studio.base / "runs" / name
    save_config(config, folder / "config.yaml")
    (folder / EVENTS_NAME).write_text("", encoding="utf-8")
    if lora:
        (folder / "lora").mkdir()
    return folder


def _ask(studio: Studio, **more: Any) -> dict[str, Any]:
    picture = studio.base / "room.png"
    Image.new("RGB", (32, 32)).save(picture)
    request = request_of(studio)
    request.update({"generate.prompt": "make it blue", "generate.image": [str(picture)], **more})
    return request.given


def _config(studio: Studio, **more: Any) -> RunConfig:
    return requested_config(studio, _ask(studio, **more))


def test_the_runs_come_first_those_with_a_lora_before_all(studio: Studio) -> None:
    _run(studio, "half", lora=False)
    _run(studio, "done")
    assert [source.run for source in sources(studio)] == ["done", "half", ""]
    assert chosen_source(studio, {}).run == "done"
    assert chosen_source(studio, {"source": "half"}).run == "half"
    assert chosen_source(studio, {"source": "deleted meanwhile"}).run == "done"


def test_the_job_has_the_runs_settings_its_lora_and_a_folder_of_its_own(studio: Studio) -> None:
    run = _run(studio, "done", **{"data.resolution": 128, "generate.seed": 7})
    before = sorted(path.name for path in run.iterdir())
    config = _config(studio, **{"generate.num_inference_steps": 4})
    assert config.data.resolution == 128
    assert (config.generate.seed, config.generate.num_inference_steps) == (7, 4)
    assert config.generate.lora == run / "lora"
    assert config.run_dir.parent == studio.base / "runs" / "pictures"
    assert sorted(path.name for path in run.iterdir()) == before
    assert _config(studio, use_lora=False).generate.lora is None


def test_two_pictures_of_one_second_have_two_folders(studio: Studio) -> None:
    _run(studio, "done")
    names = set()
    for _ in range(3):
        config = _config(studio)
        config.run_dir.mkdir(parents=True)
        (config.run_dir / EVENTS_NAME).write_text("", encoding="utf-8")
        names.add(config.name)
    assert len(names) == 3
    assert [folder.name for folder in made_pictures(studio)] == sorted(names, reverse=True)


@pytest.mark.parametrize(
    ("asked", "step_cache", "reference_cache", "side_by_side"),
    [
        ({}, "error", True, True),
        ({"caches": "off"}, None, False, True),
        ({"caches": "cached"}, "error", True, False),
        ({"step_cache": False}, None, True, True),
        ({"reference_cache": False}, "error", False, True),
        ({"gate": "distance"}, "distance", True, True),
    ],
)
def test_caches_are_as_they_were_switched(
    studio: Studio, asked: dict[str, Any], step_cache: str | None, reference_cache: bool, side_by_side: bool
) -> None:
    _run(studio, "done")
    config = _config(studio, **asked)
    assert (config.teacache.gate if config.teacache else None) == step_cache
    assert (config.reference_kv is not None) == reference_cache
    assert config.generate.side_by_side == side_by_side


def test_dials_that_were_not_touched_are_the_runs(studio: Studio) -> None:
    _run(studio, "done", **{"teacache.gate": "error", "teacache.error_tolerance": 0.004, "reference_kv.refresh": 4})
    config = _config(studio)
    assert config.teacache is not None and config.reference_kv is not None
    assert (config.teacache.error_tolerance, config.reference_kv.refresh) == (0.004, 4)
    config = _config(studio, error_tolerance=0.01, refresh=0)
    assert config.teacache is not None and config.reference_kv is not None
    assert (config.teacache.error_tolerance, config.reference_kv.refresh) == (0.01, None)
    config = _config(studio, gate="distance", rel_l1_thresh=0.3)
    assert config.teacache is not None
    assert (config.teacache.gate, config.teacache.rel_l1_thresh) == ("distance", 0.3)


def test_the_reference_cache_needs_a_reference(studio: Studio) -> None:
    _run(studio, "done")
    config = requested_config(studio, {"generate.prompt": "a red house"})
    assert config.reference_kv is None and config.teacache is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"generate.prompt": " "}, "the prompt is empty"),
        ({"generate.image": ["gone.png"]}, "take it away"),
        ({"step_cache": False, "reference_cache": False}, "No cache"),
    ],
)
def test_everything_that_is_missing_is_told_at_once(studio: Studio, given: dict[str, Any], words: str) -> None:
    _run(studio, "done")
    with pytest.raises(ConfigError, match=words):
        requested_config(studio, {**_ask(studio), **given})


def test_half_a_size_is_told(studio: Studio) -> None:
    _run(studio, "done")
    with pytest.raises(ConfigError, match="width is given without height"):
        _config(studio, **{"generate.width": 64})


def test_a_picture_outside_the_folders_is_refused(studio: Studio, tmp_path: Path) -> None:
    _run(studio, "done")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    with pytest.raises(AccessError):
        _config(studio, **{"generate.image": [str(tmp_path / "secret.png")]})


def test_a_run_whose_settings_lead_outside_is_refused(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    _run(studio, "done", **{"model.path": str(tmp_path / "model")})
    with pytest.raises(ConfigError, match="model.path"):
        _config(studio)


def test_data_outside_the_folders_is_left_alone(studio: Studio, tmp_path: Path) -> None:
    """A run of the terminal may have been trained on any folder; to make a picture it is not needed."""
    (tmp_path / "elsewhere").mkdir()
    _run(studio, "done", **{"data.path": str(tmp_path / "elsewhere"), "held_out": str(tmp_path / "elsewhere")})
    config = _config(studio)
    assert config.held_out is None
    assert config.data.path is not None and config.data.path.is_relative_to(studio.base)


def test_the_model_of_the_other_pages_needs_no_data_set(studio: Studio) -> None:
    studio.draft.set("model.path", "bundled")
    config = requested_config(studio, {**_ask(studio), "source": ""})
    assert (config.model.path, config.generate.lora) == ("bundled", None)
