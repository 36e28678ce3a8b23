"""The benchmark of isolated references on the bundled model: what it trains on, and how it compares."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import isolated_references as benchmark
from dittocache.demo.model import MODEL_DIR
from dittocache.demo.train.dataset import Dataset
from dittocache.families.registry import get_family
from dittocache.training.lora import read_reference_visibility


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        model=MODEL_DIR,
        work_dir=tmp_path,
        steps=2,
        batch_size=2,
        rank=2,
        learning_rate=1e-3,
        held_out=1,
        self_distillation=1.0,
    )


def _edits() -> Dataset:
    """Four edits of two sources, as `encode_chunks` writes them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    return Dataset(
        sources=draw(2, 64, 64),
        targets=draw(4, 64, 64),
        source_index=torch.tensor([0, 0, 1, 1]),
        embeds=draw(4, 22, 128),
        lengths=torch.tensor([20, 22, 19, 20]),
        empty=draw(2, 22, 128),
        empty_lengths=torch.tensor([15, 15]),
    )


def test_encoded_edits_are_a_familys_artifacts() -> None:
    source = benchmark.EncodedEdits(_edits())
    [batch] = source.stream([source.names[:3]])
    assert [sample["prompt_embeds"].shape for sample in batch] == [(20, 128), (22, 128), (19, 128)]
    assert torch.equal(batch[0]["control_latents"], batch[1]["control_latents"])
    assert all(0 < float(sample["loss_mask"].min()) <= float(sample["loss_mask"].max()) == 1 for sample in batch)
    inputs = get_family(benchmark.FAMILY).training_inputs(batch, torch.zeros(3, 64, 64), torch.full((3,), 0.5))
    assert inputs.transformer_kwargs["hidden_states"].shape == (3, 128, 64)
    assert inputs.transformer_kwargs["img_shapes"] == [[tuple(row) for row in source.bucket(source.names[0])]] * 3


def test_a_lora_is_trained_and_compared(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Dataset, "load", classmethod(lambda cls, folder: _edits()))
    lora, losses = benchmark.train(options, "isolated")
    assert len(losses) == 2
    assert read_reference_visibility(lora) == "isolated"
    assert benchmark.train(options, "isolated") == (lora, [])  # it is done
    rows: list[dict[str, Any]] = benchmark.compare(options, 2, {"isolated": lora})
    assert [row["way"] for row in rows] == [
        "no LoRA, zero_cond_t",
        "no LoRA, live t",
        "no LoRA, isolated",
        "LoRA, isolated",
        "LoRA, isolated, cached",
    ]
    by_way = {row["way"]: row for row in rows}
    assert by_way["LoRA, isolated, cached"]["as_uncached"] is True
    assert by_way["no LoRA, isolated"]["psnr_db"] < by_way["no LoRA, zero_cond_t"]["psnr_db"]
    assert "bit for bit" in capsys.readouterr().out


def test_a_lora_that_is_there_is_compared_and_nothing_trained(tmp_path: Path) -> None:
    words = ["--lora", "bundled", "--held-out", "1", "--sampling-steps", "2", "--results", str(tmp_path)]
    benchmark.main([*words, "--work-dir", str(tmp_path / "nothing")])
    report = json.loads((tmp_path / "isolated_references.json").read_text())
    assert report["lora"] == "bundled"
    by_way = {row["way"]: row for row in report["rows"]}
    assert by_way["LoRA, isolated, cached"]["as_uncached"] is True
    assert by_way["LoRA, isolated"]["psnr_db"] > by_way["no LoRA, isolated"]["psnr_db"] + 3
    assert not (tmp_path / "nothing").exists()
