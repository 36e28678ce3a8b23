"""Measure the bundled model on held-out edits with one right outcome: PSNR to the drawn target, share carried out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dittocache.demo.edits import EXACT_KINDS, Edit, evaluation_edits
from dittocache.demo.model import DEMO_SIZES, MODEL_DIR, load_pipeline
from dittocache.demo.scenes import SIZE
from dittocache.families.qwen_image_sizes import pipeline_sizes
from dittocache.quality.metrics import psnr

STEPS = 28
EDITED_THRESHOLD = 12.0  # mean absolute difference over RGB, of 255, from which a pixel counts as edited
REST_SQUARED_ERROR = 255.0**2 / 100  # 20 dB


@dataclass(frozen=True)
class Outcome:
    """One edit's result: PSNR to the drawn target in dB, whether it was carried out, whether the rest was kept."""

    kind: str
    instruction: str
    psnr: float
    carried_out: bool
    rest_kept: bool


def carried_out(result: Image.Image, source: Image.Image, target: Image.Image) -> bool:
    """Say whether the edited region of `result` lies nearer the target than the source (squared error)."""
    a, b, c = _array(result), _array(source), _array(target)
    edited = _edited(b, c)
    return bool(np.mean((a - c)[edited] ** 2) < np.mean((a - b)[edited] ** 2))


def rest_kept(result: Image.Image, source: Image.Image, target: Image.Image) -> bool:
    """Say whether the region that the edit leaves alone has at least 20 dB to the target; true where there is none.

    `carried_out` looks at the edited region only, so a model that removes both shapes instead of one passes there.
    """
    a, c = _array(result), _array(target)
    rest = ~_edited(_array(source), c)
    return not rest.any() or bool(np.mean((a - c)[rest] ** 2) <= REST_SQUARED_ERROR)


def _edited(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(source - target).mean(axis=-1) > EDITED_THRESHOLD)  # (H, W) bool


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def generate(
    pipeline: Any,
    source: Image.Image,
    instruction: str,
    seed: int = 0,
    steps: int = STEPS,
    **call: Any,
) -> Image.Image:
    """Edit one 128x128 picture with the stock pipeline call, without guidance unless `call` says otherwise."""
    options = {"true_cfg_scale": 1.0} | call
    with pipeline_sizes(DEMO_SIZES):
        output = pipeline(
            image=[source],
            prompt=instruction,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
    image: Image.Image = output.images[0]
    return image


def run_edits(
    pipeline: Any, edits: Sequence[Edit], steps: int = STEPS
) -> tuple[list[Outcome], list[tuple[Image.Image, Image.Image, Image.Image]]]:
    """Carry out edits, edit number i with seed i; return the outcomes and (source, result, target) pictures."""
    outcomes, pictures = [], []
    for seed, edit in enumerate(edits):
        source, target = edit.images()
        result = generate(pipeline, source, edit.instruction, seed, steps)
        done = carried_out(result, source, target)
        kept = rest_kept(result, source, target)
        outcomes.append(Outcome(edit.kind, edit.instruction, psnr(result, target), done, kept))
        pictures.append((source, result, target))
    return outcomes, pictures


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mean PSNR, share carried out, and share carried out with the rest kept, over all and by kind."""

    def figures(some: Sequence[Outcome]) -> dict[str, float]:
        return {
            "edits": len(some),
            "mean_psnr_db": round(float(np.mean([o.psnr for o in some])), 2),
            "share_carried_out": round(float(np.mean([o.carried_out for o in some])), 4),
            "share_carried_out_and_rest_kept": round(float(np.mean([o.carried_out and o.rest_kept for o in some])), 4),
        }

    kinds = {kind: [o for o in outcomes if o.kind == kind] for kind in EXACT_KINDS}
    return figures(outcomes) | {"kinds": {kind: figures(some) for kind, some in kinds.items() if some}}


def contact_sheet(pictures: Sequence[tuple[Image.Image, ...]], columns: int = 4, side: int = 64) -> Image.Image:
    """Lay the pictures of each edit side by side, `columns` edits a row, each picture `side` pixels."""
    across = len(pictures[0])
    rows = -(-len(pictures) // columns)
    gap = 6
    cell = across * side + gap
    sheet = Image.new("RGB", (columns * cell, rows * (side + gap)), "white")
    for number, group in enumerate(pictures):
        left, top = (number % columns) * cell, (number // columns) * (side + gap)
        for place, picture in enumerate(group):
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left + place * side, top))
    return sheet


def evaluate(
    model_dir: Path = MODEL_DIR, out_dir: Path | None = None, count: int = 64, steps: int = STEPS
) -> dict[str, Any]:
    """Evaluate a model folder on `count` held-out edits.

    Writes `evaluation.json` and `heldout-edits.png` (source, result, target) to `out_dir` where one is given, and
    returns what the JSON holds.
    """
    pipeline = load_pipeline(folder=model_dir)
    start = time.monotonic()
    outcomes, pictures = run_edits(pipeline, evaluation_edits(count), steps)
    report = {
        **summarise(outcomes),
        "steps": steps,
        "seconds": round(time.monotonic() - start, 1),
        "failures": [asdict(o) for o in outcomes if not (o.carried_out and o.rest_kept)],
    }
    if out_dir is not None:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        contact_sheet(pictures).quantize(128).save(out_dir / "heldout-edits.png", optimize=True)
    return report
