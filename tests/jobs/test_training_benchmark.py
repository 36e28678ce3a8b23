"""The benchmark of cached, mixed and live training, on the tiny checkpoint."""

from __future__ import annotations

from benchmarks.training import WAYS, measured, summary, table
from tests.jobs.test_whole_run import carry_out

from dittocache.config import RunConfig, save_config


def test_all_ways_give_the_same_losses(config: RunConfig) -> None:
    data = config.data.model_copy(update={"caption_dropout": 0.5})
    config = config.model_copy(update={"data": data})
    save_config(config, config.run_dir / "config.yaml")
    carry_out(config, "validate", "cache_latents", "cache_text")
    found = {way: measured(way, config.run_dir, 2) for way in WAYS}
    report = summary(config, found)
    assert report["losses_identical"]
    assert len(set(found["live"]["losses"])) == found["live"]["steps"] == 8
    assert "identical, bit for bit" in table(report)
    found["live"]["losses"][-1] += 1e-7
    assert "NOT the same" in table(summary(config, found))
