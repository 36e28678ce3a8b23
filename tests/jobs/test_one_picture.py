"""The stage that makes one picture: uncached and cached beside each other, with a LoRA of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.jobs.test_whole_run import carry_out

from dittocache.config import RunConfig, check_config
from dittocache.errors import ConfigError, ModelError
from dittocache.events import Event, EventLog
from dittocache.families.pictures import open_picture
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.stages import STAGES


def _asked(config: RunConfig, **settings: Any) -> RunConfig:
    """The run's settings with a picture and a prompt, without training anything."""
    data = config.data.path
    assert data is not None
    image = data / "control_images" / "edit-0.png"
    generate = {"generate.prompt": "make it blue", "generate.image": [str(image)], "generate.num_inference_steps": 4}
    return check_config(config.model_dump(mode="json"), {"name": "picture", **generate, **settings})


def _make(config: RunConfig) -> tuple[list[dict[str, Any]], list[Event]]:
    events: list[Event] = []
    log = EventLog(config.run_dir / "events.jsonl", "picture", events.append)
    STAGES["picture"].load()(RunInputs(config, config.run_dir), log)
    rows = [event["compared"] for event in events if event["kind"] == "result"]
    assert [len(row) for row in rows] == [1] * len(rows)
    return [row[0] for row in rows], events


def test_the_cached_picture_stands_beside_the_uncached_one(config: RunConfig) -> None:
    rows, events = _make(_asked(config))
    assert [len(row["variants"]) for row in rows] == [1, 2], "the first picture is shown while the second is made"
    plain, cached = rows[-1]["variants"]
    assert (plain["role"], cached["role"]) == ("uncached", "cached")
    assert cached["label"] == "TeaCache + reference KV"
    assert [mark for marks in plain["patterns"].values() for mark in marks] == ["computed"] * 4
    assert "skipped" in next(iter(cached["patterns"].values()))
    assert cached["bytes_held"] > 0
    assert 0 < cached["psnr"] < 100 and cached["ssim"] < 1
    for variant in (plain, cached):
        assert open_picture(config.output_dir / "picture" / variant["picture"]).size == (64, 64)
    progress = [event for event in events if event["kind"] == "progress"]
    assert (progress[-1]["done"], progress[-1]["total"]) == (8, 8), "every step of both is counted"


def test_without_side_by_side_only_the_cached_picture_is_made(config: RunConfig) -> None:
    rows, _ = _make(_asked(config, **{"generate.side_by_side": False}))
    (cached,) = rows[-1]["variants"]
    assert cached["role"] == "cached"
    assert "psnr" not in cached


def test_a_cache_that_skips_nothing_changes_nothing(config: RunConfig) -> None:
    rows, _ = _make(_asked(config, **{"teacache.rel_l1_thresh": 0, "reference_kv": None}))
    cached = rows[-1]["variants"][1]
    assert (cached["psnr"], cached["ssim"]) == (100.0, 1.0)


def test_a_lora_of_another_run_changes_the_picture_and_stays_where_it_is(config: RunConfig) -> None:
    carry_out(config, "validate", "cache_latents", "cache_text", "train")
    lora = config.run_dir / "lora"
    before = sorted(path.name for path in config.run_dir.iterdir())
    caches_off = {"teacache": None, "reference_kv": None}
    pictures = []
    for name, given in (("without", None), ("with", str(lora))):
        own = _asked(config, name=name, **caches_off, **{"generate.lora": given})
        rows, _ = _make(own)
        (plain,) = rows[-1]["variants"]
        pictures.append(open_picture(own.run_dir / plain["picture"]))
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert sorted(path.name for path in config.run_dir.iterdir()) == before


def test_the_data_set_need_not_be_there_any_more(config: RunConfig, tmp_path: Path) -> None:
    rows, events = _make(_asked(config, **{"data.path": str(tmp_path / "moved")}))
    assert len(rows[-1]["variants"]) == 2
    warnings = [event["text"] for event in events if event["kind"] == "message"]
    assert any("data set cannot be read" in text for text in warnings)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"generate.prompt": " "}, ConfigError, "generate.prompt is missing"),
        ({"generate.lora": "nowhere/lora"}, ModelError, "nowhere/lora"),
    ],
)
def test_what_is_missing_is_named(
    config: RunConfig, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        _make(_asked(config, **settings))
