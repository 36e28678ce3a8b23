"""A report of drawn pictures and made-up numbers, for tests and for looking at the page without a model.

python tests/quality/sample_report.py report.html
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dittocache.quality.report import write_report
from dittocache.quality.report_caches import CachesSection, ComparedEdit, SkipPattern, StepMark, Variant
from dittocache.quality.report_data import (
    BeforeAfterSection,
    CachedArtifact,
    CachedSection,
    HeldOutEdit,
    LossSection,
    Machine,
    Report,
    SamplePair,
    SamplesSection,
    TrainingSpeed,
    TrainingSpeedSection,
)
from dittocache.quality.report_tuning import TuningPoint, TuningSection

COLOURS = ["#c0392b", "#2471a3", "#1e8449", "#d4ac0d", "#7d3c98", "#ca6f1e"]


def drawn(seed: int, frame: bool = False, side: int = 128) -> Image.Image:
    """Three shapes on a pale ground; `frame` adds the border that the LoRA is to learn."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(int(value) for value in rng.integers(205, 245, 3)))
    draw = ImageDraw.Draw(image)
    for index in range(3):
        left, top = (int(value) for value in rng.integers(10, side - 55, 2))
        size = int(rng.integers(26, 46))
        shape = draw.ellipse if index % 2 else draw.rectangle
        shape((left, top, left + size, top + size), fill=COLOURS[int(rng.integers(len(COLOURS)))])
    if frame:
        draw.rectangle((0, 0, side - 1, side - 1), outline="#1b2631", width=8)
    return image


def noisy(image: Image.Image, amount: float, seed: int) -> Image.Image:
    """The picture with an error that is larger around the edges of shapes, as sampling errors are."""
    rng = np.random.default_rng(seed)
    values = np.asarray(image, dtype=np.float64)
    rows, columns = np.gradient(values.mean(axis=2))
    strength = amount * (0.15 + np.minimum(np.hypot(rows, columns) / 20, 1.0))[:, :, None]
    return Image.fromarray(np.clip(values + rng.normal(size=values.shape) * strength, 0, 255).round().astype(np.uint8))


def pattern(text: str, branch: str = "cond") -> SkipPattern:
    """`RKCS` -> refreshed, kept, computed, skipped."""
    words: dict[str, StepMark] = {"R": "refreshed", "K": "kept", "C": "computed", "S": "skipped"}
    return SkipPattern(branch, tuple(words[letter] for letter in text))


def compared_edit(seed: int, caption: str) -> ComparedEdit:
    target = drawn(seed, frame=True)
    uncached = noisy(target, 6, seed)
    tea = "CCSCSSCSSSCSSSSCSSSCSSSCSSCC"
    both = ("R" + tea[1:]).replace("C", "K")
    return ComparedEdit(
        caption=caption,
        source=drawn(seed),
        variants=(
            Variant("Uncached", "uncached", uncached, 3.92, (pattern("C" * 28),), "28 steps"),
            Variant(
                "TeaCache",
                "cached",
                noisy(uncached, 4 + seed % 3, 1),
                1.71,
                (pattern(tea),),
                "rel_l1_thresh 0.2",
                786432,
            ),
            Variant(
                "Reference KV",
                "cached",
                noisy(uncached, 1, 2),
                2.38,
                (pattern("R" + "K" * 27),),
                "refresh: first step",
                5242880,
            ),
            Variant(
                "TeaCache + reference KV",
                "cached",
                noisy(uncached, 6 + seed % 4, 3),
                1.04,
                (pattern(both),),
                "0.2, first step",
                6029312,
            ),
            Variant("11 plain steps", "fewer_steps", noisy(uncached, 14, 4), 1.58, (pattern("C" * 11),)),
        ),
    )


def tuning_section() -> TuningSection:
    """Plain steps, and two kinds of caches, of which one is recommended."""
    rng = np.random.default_rng(1)
    points = []
    for label, height, plain in (("plain", 62.0, True), ("distance, residual", 66.0, False), ("error", 76.0, False)):
        for speedup in np.linspace(1.1, 3.0, 9):
            decibels = float(height - 11 * (speedup - 1) + rng.normal(0, 0.4))
            distance = 10 ** (-decibels / 20)
            points.append(
                TuningPoint(
                    f"{label} {speedup:.2f}",
                    float(speedup),
                    float(1 + 0.8 * (speedup - 1)),
                    decibels,
                    decibels - 4,
                    1 - distance,
                    1 - 2 * distance,
                    2 * distance,
                    4 * distance,
                    plain,
                    chosen=label == "error" and bool(speedup == 3.0),
                )
            )
    return TuningSection(tuple(points), "psnr>=50 is kept by error 3.00: 3.00x, 54.1 dB on 8 unseen pictures")


def sample_report() -> Report:
    rng = np.random.default_rng(0)
    steps = tuple(range(1, 241))
    losses = tuple(float(0.35 * step**-0.35 + 0.05 + rng.gamma(2.0, 0.012)) for step in steps)
    edits = tuple(
        HeldOutEdit(
            caption=f"Put a dark frame around picture {seed}",
            source=drawn(seed),
            base=noisy(drawn(seed), 10, seed),
            lora=noisy(drawn(seed, frame=True), 5 + 3 * (seed % 5), seed),
            target=drawn(seed, frame=True),
        )
        for seed in range(40, 52)
    )
    return Report(
        title="dittocache demo",
        date=datetime(2026, 1, 31, 14, 5, tzinfo=UTC),
        command="dittocache demo --output runs/demo",
        machine=Machine(
            cpu="Example CPU 7000 @ 2.6 GHz",
            cores=2,
            memory_bytes=8 * 2**30,
            system="Linux x86_64",
            versions=(("python", "3.11.9"), ("torch", "2.13.0"), ("diffusers", "0.42.1"), ("transformers", "5.23.0")),
        ),
        samples=SamplesSection(
            tuple(
                SamplePair("Put a dark frame around the picture", drawn(seed, frame=True), drawn(seed))
                for seed in range(8)
            ),
            total=40,
        ),
        cached=CachedSection(
            (
                CachedArtifact("image_latents", "vae", 0, 40, 40 * 33000, 0.0),
                CachedArtifact("control_latents", "vae", 0, 40, 40 * 33000, 0.0),
                CachedArtifact("prompt_embeds", "text_encoder", 0, 40, 40 * 120_000, 0.0),
                CachedArtifact("prompt_embeds_mask", "text_encoder", 0, 40, 40 * 700, 0.0),
            ),
            seconds=0.42,
        ),
        training_speed=TrainingSpeedSection(
            live=TrainingSpeed("Live", 0.412, 10, 913 * 2**20), cached=TrainingSpeed("Cached", 0.187, 240, 512 * 2**20)
        ),
        loss=LossSection(steps, losses),
        before_after=BeforeAfterSection(edits, shown=3),
        caches=CachesSection(
            tuple(compared_edit(seed, f"Put a dark frame around picture {seed}") for seed in (60, 61, 62)),
            note="Wall times are of one request each, on a machine that did nothing else.",
        ),
        tuning=tuning_section(),
    )


if __name__ == "__main__":
    write_report(sample_report(), Path(sys.argv[1]))
