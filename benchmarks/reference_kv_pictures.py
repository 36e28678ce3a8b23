"""The picture strip of docs/reference-kv.md: edits without a cache, with old references, with the default.

    python -m benchmarks.reference_kv_pictures [--edits 0 2 4] [--steps 8]

A row an edit: uncached, references kept from step 0, the default, and eight times the difference of the two to the
first. Writes docs/images/reference-kv.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.reference_kv_quality import Runs, Setting
from PIL import Image

from dittocache.demo.edits import evaluation_edits
from dittocache.quality.metrics import psnr
from dittocache.quality.pictures import contact_sheet, difference_map
from dittocache.referencekv.config import ReferenceKVConfig

STRIP = Path(__file__).parents[1] / "docs/images/reference-kv.png"
FACTOR = 8


def row(runs: Runs, number: int, steps: int) -> tuple[Image.Image, ...]:
    """The five pictures of one edit."""
    plain, _, _ = runs.run(number, steps, Setting("plain"))
    cached = [
        runs.run(number, steps, Setting("", config))[0]
        for config in (ReferenceKVConfig(refresh=(0,)), ReferenceKVConfig())
    ]
    print(f"edit {number}: {psnr(cached[0], plain):.1f} dB from step 0, {psnr(cached[1], plain):.1f} dB the default")
    return (plain, *cached, *(difference_map(one, plain, FACTOR) for one in cached))


def main(words: Sequence[str] | None = None) -> None:
    """Make the pictures and write the strip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, nargs="+", default=[0, 2, 4], help="numbers of held-out edits (0 2 4)")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps (default 8)")
    parser.add_argument("--out", type=Path, default=STRIP, help="where the strip goes")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    runs = Runs("zero", evaluation_edits(max(options.edits) + 1))
    pictures = [picture for number in options.edits for picture in row(runs, number, options.steps)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, columns=5).quantize(128).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
