"""An edit to try: from the run's own data, the demo's pictures too, and never a picture from outside the folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dittocache.config import check_config, save_config
from dittocache.demo.model import SAMPLES_DIR
from dittocache.errors import AccessError, DataError
from dittocache.studio.examples import pick_example
from dittocache.studio.state import Studio


def _run(studio: Studio, **settings: Any) -> None:
    config = check_config({"model": {"path": "bundled"}, "data": {"path": "edits"}}, settings)
    folder = studio.base / "runs" / "run"
    save_config(config, folder / "config.yaml")


def test_it_is_of_the_runs_data(studio: Studio, edits: Path) -> None:
    _run(studio)
    example = pick_example(studio, {})
    assert example.prompt.startswith("make number")
    (image,) = example.images
    assert image.parent == edits / "control_images"


def test_the_demos_own_pictures_are_copied(studio: Studio) -> None:
    _run(studio, **{"data.path": SAMPLES_DIR / "train", "held_out": SAMPLES_DIR / "heldout"})
    example = pick_example(studio, {})
    assert example.prompt
    assert all(studio.roots.holds(image) for image in example.images)


def test_a_table_cannot_name_a_picture_outside(studio: Studio, tmp_path: Path) -> None:
    for name in ("target.png", "secret.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    table = studio.base / "set.csv"
    table.write_text(
        f"path_target,path_control,prompt\n{tmp_path / 'target.png'},{tmp_path / 'secret.png'},make it blue\n"
    )
    _run(studio, **{"data.path": table})
    with pytest.raises(AccessError):
        pick_example(studio, {})
    assert not list(studio.home.rglob("*.png"))


def test_data_outside_and_data_that_is_gone_are_told(studio: Studio, tmp_path: Path) -> None:
    _run(studio, **{"data.path": tmp_path})
    with pytest.raises(AccessError):
        pick_example(studio, {})
    _run(studio, **{"data.path": "gone"})
    with pytest.raises(DataError):
        pick_example(studio, {})
