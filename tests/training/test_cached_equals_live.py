"""The whole way through the store: what training reads from the cache is what it would have encoded, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.data.digests import ContentIndex
from dittocache.data.sample import Sample
from dittocache.demo.tiny import save_tiny
from dittocache.embeddings.encoding.encode import encode_missing
from dittocache.embeddings.planning.plan import make_plan
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.embeddings.store.store import Store
from dittocache.events import EventLog
from dittocache.families.base import Family, Sizes
from dittocache.training.config import TrainConfig
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora
from dittocache.training.sources import CachedSource, LiveSource, MixedSource

SIZES = Sizes(resolution=64, condition_resolution=32)
ENCODERS = ("vae", "text_encoder", None)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_tiny(tmp_path / "model", "qwen-image-edit-plus"))


@pytest.fixture
def cached(tmp_path: Path, model: str, family: Family, samples: list[Sample], dtype: torch.dtype) -> CachedSamples:
    store, index = Store(tmp_path / "store"), ContentIndex(tmp_path / "index.json")
    plan = make_plan(samples, family, SIZES, model, dtype, store, index)
    log = EventLog(tmp_path / "events.jsonl", "cache")
    result = encode_missing(plan, ENCODERS, family, model, dtype, "cpu", 4, store, log)
    assert result.failed == {}
    return CachedSamples(store, plan.manifest)


@pytest.fixture
def live(model: str, family: Family, samples: list[Sample], dtype: torch.dtype) -> LiveSource:
    components = {"vae", "text_encoder", "tokenizer", "processor"}
    return LiveSource(family.load_pipeline(model, components, dtype, "cpu"), family, samples, SIZES)


def test_tensors_and_losses_are_the_same_bit_for_bit(
    cached: CachedSamples, live: LiveSource, model: str, family: Family, names: list[str], dtype: torch.dtype
) -> None:
    source = CachedSource(cached)
    for stored, encoded in zip(source.load(names), live.load(names), strict=True):
        assert set(stored) == set(encoded)
        for name, tensor in stored.items():
            assert tensor.dtype == encoded[name].dtype, name
            assert torch.equal(tensor, encoded[name]), name

    def losses(one: Any) -> list[float]:
        transformer = family.load_pipeline(model, {"transformer"}, dtype, "cpu").transformer
        config = TrainConfig(steps=4, batch_size=2, rank=2, learning_rate=1e-2)
        add_lora(transformer, family, config)
        return [state.loss for state in train_lora(transformer, family, one, names, config, caption_dropout=0.5)]

    assert losses(source) == losses(live)


def test_damaged_and_missing_records_fall_back_to_live(
    cached: CachedSamples, live: LiveSource, tmp_path: Path, names: list[str]
) -> None:
    records = sorted((tmp_path / "store").rglob("*.safetensors"))
    records[0].write_bytes(records[0].read_bytes()[:-7])
    records[1].unlink()
    notices: list[str] = []
    mixed = MixedSource(CachedSource(cached), lambda: live, notices.append)
    batches = [[name] for name in names] * 3
    for [name], [tensors] in zip(batches, mixed.stream(batches), strict=True):
        [expected] = live.load([name])
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert len(notices) == 1
