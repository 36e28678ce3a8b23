"""The demo job: the bundled model learns a new edit, from bundled pictures, and a report shows every cache at work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dittocache.config import BUNDLED, RunConfig, check_config

SETTINGS: Mapping[str, Any] = {
    "name": "demo",
    "model": {"path": BUNDLED, "dtype": "float32", "device": "cpu"},
    "data": {"resolution": 128, "condition_resolution": 64},
    "cache": {"cache_dir": "cache/demo"},
    "train": {
        "steps": 200,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "warmup_steps": 10,
        "rank": 16,
        "timestep_sampling": "shifted",  # a restyled picture is decided at high noise: +2 dB over logit-normal
        "timestep_shift": 3.0,
        "checkpoint_every": 100,
    },
    "generate": {"num_inference_steps": 28},
    "teacache": {"gate": "error", "error_tolerance": 0.002},
    "reference_kv": {"refresh": 4},
}
"""The same as configs/demo.yaml, but for the paths, which here are those of the installed package."""


def demo_config(overrides: Mapping[str, Any] | None = None, output_dir: Path = Path("runs")) -> RunConfig:
    """Settings of the demo job; the pictures are those that come with the package."""
    from dittocache.demo.model import SAMPLES_DIR

    settings: dict[str, Any] = {**SETTINGS, "output_dir": output_dir, "held_out": SAMPLES_DIR / "heldout"}
    settings["data"] = {**SETTINGS["data"], "path": SAMPLES_DIR / "train"}
    return check_config(settings, overrides, origin="the demo job")
