"""What isolated references cost in edit quality, and that their cache is exact: on the bundled model, fine-tuned.

    python -m benchmarks.isolated_references --lora bundled
    python -m benchmarks.isolated_references [--steps 4000] [--rank 12] [--work-dir runs/isolated-references]

The first takes the LoRA that comes with the bundled model as it is. The second trains:

Two LoRAs are trained on the same general edits of the bundled data generator, with the same batches, noise and seed:
one with isolated references, one with full visibility, so that what fine-tuning itself changes is seen too. Then held-
out edits are made in every way and compared with their drawn targets: PSNR and SSIM, and the share carried out. The
reference KV cache with isolated references must give the uncached picture bit for bit. Encoded edits and checkpoints
stay in the work folder, where a run that was stopped goes on. Prints a table, saves
benchmarks/results/isolated_references.json and ends with an error where the cache was not exact.

Both kinds of checkpoint are the starting point: `zero_cond_t` on (Qwen-Image-Edit-2511) and off (2509); with isolated
references they are the same model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dittocache.demo.edits import evaluation_edits
from dittocache.demo.evaluate import carried_out, generate
from dittocache.demo.model import EXACT_LORA_DIR, MODEL_DIR, load_pipeline
from dittocache.demo.train.dataset import Dataset
from dittocache.demo.train.encode import CHUNK, encode_chunks
from dittocache.families.base import Tensors
from dittocache.families.registry import get_family
from dittocache.quality.machine import describe_machine
from dittocache.quality.metrics import psnr, ssim
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.isolation import isolate_references
from dittocache.sampling.session import cached
from dittocache.training.checkpoint import checkpoints
from dittocache.training.config import TrainConfig
from dittocache.training.loop import train_lora
from dittocache.training.lora import add_lora, read_reference_visibility
from dittocache.training.sources import Bucket

RESULTS = Path(__file__).parent / "results"
FAMILY = "qwen-image-edit-plus"
SHAPES = torch.tensor([[1, 8, 8], [1, 8, 8]], dtype=torch.int32)  # target and source in packed latents
CAPTION_DROPOUT = 0.1
VISIBILITIES = ("isolated", "full")


class EncodedEdits:
    """Source of the encoded edits of the bundled data generator, edited tokens weighing more, as in its training."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self.names = [f"edit-{number:05d}" for number in range(len(data))]
        self._index = {name: number for number, name in enumerate(self.names)}

    def load(self, names: Sequence[str]) -> list[Tensors]:
        """The artifacts of each edit."""
        return [self._one(self._index[name]) for name in names]

    def stream(self, batches: Iterable[Sequence[str]]) -> Iterator[list[Tensors]]:
        """One batch after another."""
        return map(self.load, batches)

    def bucket(self, name: str) -> Bucket:
        """All edits are of one size."""
        return tuple(map(tuple, SHAPES.tolist()))

    def _one(self, number: int) -> Tensors:
        data = self._data
        origin, length = int(data.source_index[number]), int(data.lengths[number])
        empty_length = int(data.empty_lengths[origin])
        weights = data.batch(torch.tensor([number]), 0.0, torch.Generator())["weights"][0]
        return {
            "image_latents": data.targets[number].float(),
            "control_latents": data.sources[origin].float(),
            "prompt_embeds": data.embeds[number, :length].float(),
            "prompt_embeds_mask": torch.ones(length, dtype=torch.bool),
            "empty_prompt_embeds": data.empty[origin, :empty_length].float(),
            "empty_prompt_embeds_mask": torch.ones(empty_length, dtype=torch.bool),
            "img_shapes": SHAPES,
            "loss_mask": weights / weights.max(),
        }


def settings(options: argparse.Namespace, visibility: str) -> TrainConfig:
    """The same for both LoRAs but for the visibility."""
    return TrainConfig.model_validate(
        {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "rank": options.rank,
            "learning_rate": options.learning_rate,
            "warmup_steps": 50,
            "timestep_sampling": "shifted",
            "timestep_shift": 2.5,
            "checkpoint_every": 50,
            "keep_checkpoints": 2,
            "reference_visibility": visibility,
            "self_distillation": options.self_distillation if visibility == "isolated" else 0.0,
        }
    )


def train(options: argparse.Namespace, visibility: str) -> tuple[Path, list[float]]:
    """Train one LoRA, or go on where it stopped; its checkpoint, and the losses of the steps taken now."""
    family, config = get_family(FAMILY), settings(options, visibility)
    folder = options.work_dir / visibility
    done = checkpoints(folder)
    if done and done[-1].name.endswith(f"{options.steps:08d}"):
        return done[-1], []
    source = EncodedEdits(Dataset.load(options.work_dir))
    transformer = load_pipeline(folder=options.model).transformer
    add_lora(transformer, family, config)
    losses = []
    began = time.monotonic()
    for state in train_lora(
        transformer,
        family,
        source,
        source.names,
        config,
        caption_dropout=CAPTION_DROPOUT,
        checkpoint_dir=folder,
        resume=True,
    ):
        losses.append(state.loss)
        if state.step % 50 == 0:
            mean = statistics.fmean(losses[-50:])
            print(f"{visibility} {state.step} loss {mean:.4f} {time.monotonic() - began:.0f} s", flush=True)
    return checkpoints(folder)[-1], losses


def evaluated(
    options: argparse.Namespace, steps: int, lora: Path | None, zero_cond_t: bool, isolated: bool, cache: bool = False
) -> tuple[dict[str, Any], list[Image.Image]]:
    """One way of making the held-out edits: its figures and its pictures."""
    pipe = load_pipeline(folder=options.model)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, *pipe.transformer.transformer_blocks):
        part.zero_cond_t = zero_cond_t
    if lora is not None:
        pipe.load_lora_weights(lora)
    if isolated:
        isolate_references(pipe)
    scores, pictures, seconds = [], [], []
    for seed, edit in enumerate(evaluation_edits(options.held_out)):
        source, target = edit.images()
        with cached(pipe, reference_kv=ReferenceKVConfig() if cache else None) as trace:
            picture = generate(pipe, source, edit.instruction, seed, steps)
        scores.append((psnr(picture, target), ssim(picture, target), carried_out(picture, source, target)))
        seconds.append(sum(step.seconds for step in trace.steps))
        pictures.append(picture)
    mean_psnr, mean_ssim, share = (statistics.fmean(column) for column in zip(*scores, strict=True))
    figures = {"psnr_db": mean_psnr, "ssim": mean_ssim, "carried_out": share}
    return {**figures, "transformer_seconds": statistics.median(seconds), "edits": len(scores)}, pictures


def compare(options: argparse.Namespace, steps: int, loras: dict[str, Path]) -> list[dict[str, Any]]:
    """Every way at so many denoising steps."""
    ways: list[tuple[str, Path | None, bool, bool]] = [
        ("no LoRA, zero_cond_t", None, True, False),
        ("no LoRA, live t", None, False, False),
        ("no LoRA, isolated", None, True, True),
    ]
    for visibility, folder in loras.items():
        ways.append((f"LoRA, {visibility}", folder, True, read_reference_visibility(folder) == "isolated"))
    rows = []
    for label, lora, zero_cond_t, isolated in ways:
        figures, pictures = evaluated(options, steps, lora, zero_cond_t, isolated)
        rows.append({"way": label, "steps": steps, **figures})
        if lora is not None and isolated:
            figures, again = evaluated(options, steps, lora, zero_cond_t, isolated, cache=True)
            same = all(one.tobytes() == other.tobytes() for one, other in zip(pictures, again, strict=True))
            rows.append({"way": f"{label}, cached", "steps": steps, **figures, "as_uncached": same})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    exact = {True: "bit for bit", False: "DIFFERS", None: ""}[row.get("as_uncached")]
    numbers = f"{row['steps']:>6}{row['psnr_db']:>9.2f}{row['ssim']:>8.4f}{row['carried_out']:>13.1%}"
    return f"{row['way']:24}{numbers}{1000 * row['transformer_seconds']:>8.0f}  {exact}"


def how_trained(options: argparse.Namespace) -> dict[str, Any]:
    """For the report: the settings of the training, or which LoRA was compared."""
    if options.lora is not None:
        return {"lora": options.lora}
    return {
        "settings": settings(options, "isolated").model_dump(mode="json"),
        "training_edits": options.chunks * CHUNK,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Encode, train, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default 4000)")
    parser.add_argument("--rank", type=int, default=12, help="LoRA rank (default 12)")
    parser.add_argument("--batch-size", type=int, default=16, help="edits a step (default 16)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    parser.add_argument(
        "--self-distillation", type=float, default=0.0, help="share of the model's own velocity in the target (0)"
    )
    parser.add_argument("--chunks", type=int, default=4, help=f"training edits, in lots of {CHUNK} (default 4)")
    parser.add_argument("--held-out", type=int, default=32, help="held-out edits (default 32)")
    parser.add_argument("--sampling-steps", type=int, nargs="+", default=[8, 28], help="denoising steps (8 28)")
    parser.add_argument("--only", choices=VISIBILITIES, help="train this LoRA alone, and compare nothing")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="the bundled model's folder")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/isolated-references"), help="encoded edits, LoRAs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--publish", type=Path, help="copy the isolated LoRA into this folder")
    parser.add_argument("--lora", help="folder of a LoRA to compare instead of training any, or `bundled`")
    options = parser.parse_args(words)
    if options.lora is not None:
        folder = EXACT_LORA_DIR if options.lora == "bundled" else Path(options.lora)
        loras = {str(read_reference_visibility(folder)): folder}
    else:
        encode_chunks(options.work_dir, options.model, options.chunks)
        if options.only:
            train(options, options.only)
            return
        loras = {visibility: train(options, visibility)[0] for visibility in VISIBILITIES}
    print(f"{'way':24}{'steps':>6}{'PSNR dB':>9}{'SSIM':>8}{'carried out':>13}{'ms':>8}")
    rows = [row for steps in options.sampling_steps for row in compare(options, steps, loras)]
    report = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": vars(describe_machine()),
        **how_trained(options),
        "rows": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "isolated_references.json").write_text(json.dumps(report, indent=2) + "\n")
    if options.publish is not None:
        options.publish.mkdir(parents=True, exist_ok=True)
        shutil.copy(loras["isolated"] / "pytorch_lora_weights.safetensors", options.publish)
    if not all(row.get("as_uncached", True) for row in rows):
        sys.exit("the reference KV cache was not exact with isolated references: see the results")


if __name__ == "__main__":
    main()
