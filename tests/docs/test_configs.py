"""Every shipped config loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from dittocache.config import load_config
from dittocache.families.registry import FAMILIES

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("**/*.yaml"))


def test_there_are_configs() -> None:
    assert {path.name for path in CONFIGS} >= {"demo.yaml", "qwen-image-edit-plus.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.model.family is None or config.model.family in FAMILIES
