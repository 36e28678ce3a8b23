"""The benchmark of cached, mixed and live training, on tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.training import WAYS, caching_costs, measured, settings_of, shared_out, summary, table, turned
from tests.jobs.test_whole_run import carry_out

from dittocache.config import RunConfig, save_config
from dittocache.families.registry import FAMILIES


def test_all_ways_give_the_same_losses(config: RunConfig) -> None:
    data = config.data.model_copy(update={"caption_dropout": 0.5})
    config = config.model_copy(update={"data": data})
    save_config(config, config.run_dir / "config.yaml")
    carry_out(config, "validate", "cache_latents", "cache_text")
    caching = caching_costs(config.run_dir)
    assert caching["records"] == 25
    assert caching["records_there_already"] == 0
    found = {way: measured(way, config.run_dir, 2, share=0.5) for way in WAYS}
    report = summary(config, 0.5, caching, [found])
    assert report["losses_identical"]
    assert found["mixed"]["encoded_live"] == 2
    assert len(set(found["live"]["losses"])) == found["live"]["steps"] == 8
    assert report["first_epoch_with_caching_seconds"] > found["cached"]["seconds_per_epoch"]
    assert "identical, bit for bit" in table(report)
    found["live"]["losses"][-1] += 1e-7
    assert "NOT the same" in table(summary(config, 0.5, caching, [found]))


def test_where_caching_does_not_pay_the_table_says_so(config: RunConfig) -> None:
    way = {"seconds_per_step": 1.0, "seconds_per_epoch": 4.0, "load_share": 0.0, "peak_bytes": 1, "losses": [1.0]}
    faster = {**way, "seconds_per_epoch": 2.0}
    caching = {"seconds": 1.0}
    pays = summary(config, 0.5, caching, [{"cached": faster, "mixed": way, "live": way}])
    assert pays["epochs_until_caching_pays"] == 0.5
    assert pays["speedup"] == 2.0
    never = summary(config, 0.5, caching, [{"cached": way, "mixed": way, "live": faster}])
    assert "it pays never" in table(never)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_tiny_run(family: str, tmp_path: Path) -> None:
    config = settings_of(tmp_path, {"family": family, "train.steps": 2})
    assert config.model.family == family
    assert config.data.caption_dropout == 0
    carry_out(config, "validate")


def test_samples_of_the_mixed_way_are_evenly_spread() -> None:
    names = [str(number) for number in range(8)]
    assert shared_out(names, 0.5) == ["1", "3", "5", "7"]
    assert shared_out(names, 0.25) == ["3", "7"]
    assert shared_out(names, 1.0) == names
    assert shared_out(names, 0.0) == []


def test_every_way_is_first_once() -> None:
    assert [turned(WAYS, number)[0] for number in range(3)] == list(WAYS)
