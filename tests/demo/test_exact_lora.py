"""The exact-cache LoRA of the bundled model: how it is trained, and that what it promises holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.demo.edits import evaluation_edits
from dittocache.demo.evaluate import generate
from dittocache.demo.model import EXACT_LORA_DIR, MODEL_DIR, load_pipeline
from dittocache.demo.train import exact_lora
from dittocache.demo.train.configs import build_transformer
from dittocache.demo.train.dataset import Dataset
from dittocache.demo.train.fast import GRID, TrainingForward
from dittocache.quality.metrics import psnr
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.isolation import isolate_references
from dittocache.sampling.session import cached
from dittocache.training.lora import read_reference_visibility


def _stock(transformer: Any, noisy: torch.Tensor, reference: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    velocity: torch.Tensor = transformer(
        hidden_states=torch.cat([noisy, reference], dim=1),
        timestep=torch.tensor([0.2, 0.9]),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=torch.ones(embeds.shape[:2], dtype=torch.bool),
        img_shapes=[[GRID, GRID]] * 2,
        return_dict=False,
    )[0]
    return velocity[:, :64]


def _draw(salt: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(salt))


@torch.no_grad()
def test_the_mask_of_the_fast_forward_is_isolation() -> None:
    transformer = build_transformer(True)
    for number, parameter in enumerate(transformer.parameters()):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
    noisy, reference, embeds = _draw(1, 2, 64, 64), _draw(2, 2, 64, 64), _draw(3, 2, 22, 128)
    ours = TrainingForward(transformer, 22, compiled=False, isolated=True)(
        noisy,
        reference,
        torch.tensor([0.2, 0.9]),
        embeds,
        torch.ones(2, 22, dtype=torch.bool),
        torch.ones(2, dtype=torch.bool),
    )
    full = _stock(transformer, noisy, reference, embeds)
    with isolate_references(transformer):
        isolated = _stock(transformer, noisy, reference, embeds)
    torch.testing.assert_close(ours, isolated, atol=1e-5, rtol=1e-4)
    assert (isolated - full).abs().max() > 1e-3


def _edits() -> Dataset:
    """Four edits of two sources, as `encode_chunks` writes them."""
    return Dataset(
        sources=_draw(1, 2, 64, 64).half(),
        targets=_draw(2, 4, 64, 64).half(),
        source_index=torch.tensor([0, 0, 1, 1]),
        embeds=_draw(3, 4, 22, 128).half(),
        lengths=torch.tensor([20, 22, 19, 20]),
        empty=_draw(4, 2, 22, 128).half(),
        empty_lengths=torch.tensor([15, 15]),
    )


def test_training_goes_on_where_it_stopped_and_writes_a_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "load", classmethod(lambda cls, folder: _edits()))
    monkeypatch.setattr(Dataset, "load_heldout", classmethod(lambda cls, folder: _edits()))
    monkeypatch.setattr(exact_lora, "BATCH", 2)
    monkeypatch.setattr(exact_lora, "RANK", 4)
    monkeypatch.setattr(exact_lora, "SAVE_STEPS", 1)
    monkeypatch.setattr(exact_lora, "CHECK_STEPS", 1)
    first = exact_lora.train_exact_lora(tmp_path, MODEL_DIR, minutes=60, compiled=False)
    assert [next(first), next(first)] == [1, 2]
    again = exact_lora.train_exact_lora(tmp_path, MODEL_DIR, minutes=60, compiled=False)
    assert next(again) == 3
    assert read_reference_visibility(tmp_path / "exact-lora") == "isolated"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [1, 2, 3]


def test_training_begins_with_a_lora_of_a_lower_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "load", classmethod(lambda cls, folder: _edits()))
    monkeypatch.setattr(Dataset, "load_heldout", classmethod(lambda cls, folder: _edits()))
    monkeypatch.setattr(exact_lora, "BATCH", 2)
    monkeypatch.setattr(exact_lora, "RATE", 0.0)
    bundled = exact_lora.read_factors(EXACT_LORA_DIR)
    monkeypatch.setattr(exact_lora, "RANK", 3 + len(next(iter(bundled.values()))[0]))
    monkeypatch.setattr(exact_lora, "SAVE_STEPS", 1)
    next(exact_lora.train_exact_lora(tmp_path, MODEL_DIR, minutes=60, compiled=False, start=EXACT_LORA_DIR))
    for name, (down, up) in exact_lora.read_factors(tmp_path / "exact-lora").items():
        before = bundled[name][1].float() @ bundled[name][0].float()
        torch.testing.assert_close(up.float() @ down.float(), before, atol=1e-3, rtol=1e-2)


@torch.no_grad()
def test_a_saved_lora_is_what_was_trained(tmp_path: Path) -> None:
    transformer = load_pipeline().transformer
    factors = exact_lora.add_factors(transformer, rank=4)
    for number, part in enumerate(factors.values()):
        part.up.copy_(0.05 * _draw(number, *part.up.shape))
        part.merge()
    noisy, reference, embeds = _draw(1, 2, 64, 64), _draw(2, 2, 64, 64), _draw(3, 2, 22, 128)
    expected = _stock(transformer, noisy, reference, embeds)
    exact_lora.save_factors(tmp_path, MODEL_DIR, {name: (part.down, part.up) for name, part in factors.items()})
    read = exact_lora.read_factors(tmp_path)
    assert read.keys() == factors.keys()
    assert all(torch.equal(up, factors[name].up.half()) for name, (_, up) in read.items())
    pipe = load_pipeline()
    without = _stock(pipe.transformer, noisy, reference, embeds)
    pipe.load_lora_weights(tmp_path)
    found = _stock(pipe.transformer, noisy, reference, embeds)
    assert (found - expected).norm() < 0.01 * (expected - without).norm()  # 16-bit factors


def test_with_the_bundled_lora_cached_pictures_are_the_uncached_ones() -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    assert read_reference_visibility(EXACT_LORA_DIR) == "isolated"
    assert sum(path.stat().st_size for path in EXACT_LORA_DIR.iterdir()) < 3e6
    edits = evaluation_edits(2)
    full = [generate(pipe, edit.images()[0], edit.instruction, seed, steps=4) for seed, edit in enumerate(edits)]
    pipe.load_lora_weights(EXACT_LORA_DIR)
    for seed, edit in enumerate(edits):
        source, target = edit.images()
        with isolate_references(pipe):
            uncached = generate(pipe, source, edit.instruction, seed, steps=4)
        with cached(pipe, reference_kv=ReferenceKVConfig(mode="exact")) as trace:  # isolates by itself
            picture = generate(pipe, source, edit.instruction, seed, steps=4)
        assert picture.tobytes() == uncached.tobytes()
        assert trace.references_reused >= 3
        assert psnr(picture, target) > psnr(full[seed], target) - 2  # 11 dB less without the LoRA, in the first
