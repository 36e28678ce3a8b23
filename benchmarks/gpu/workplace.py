"""What the GPU benchmarks work on: a checkpoint with random weights, pictures, a cache; and where results go."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.random_models import RandomWeights, make_checkpoint
from PIL import Image

from dittocache.data.digests import ContentIndex
from dittocache.data.sample import Sample
from dittocache.embeddings.encoding.memory import is_out_of_memory
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.store.store import Store
from dittocache.errors import DataError
from dittocache.families.base import Batching, Sizes
from dittocache.families.registry import get_family
from dittocache.quality.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
TINY_RESOLUTION, RESOLUTION = 64, 1024
WORDS = "make the circle red "  # the tiny tokenizers know these words whole, as real ones would
CAPTION_WORDS = 40


@dataclass(frozen=True)
class Workplace:
    """A folder with a checkpoint (`model`), pictures (`set`), a cache and what else a benchmark writes."""

    folder: Path
    family_name: str
    tiny: bool
    resolution: int
    samples_made: int

    @property
    def family(self) -> Any:
        """The family, with random weights; a new one each time, for it counts the seconds of building."""
        return RandomWeights(get_family(self.family_name))

    @property
    def model(self) -> Path:
        """The checkpoint's folder."""
        return self.folder / "model"

    @property
    def store(self) -> Store:
        """The cache of this workplace."""
        return Store(self.folder / "cache")

    @property
    def sizes(self) -> Sizes:
        """1024 and 384 pixels, as the checkpoints are used."""
        return Sizes(self.resolution, 32 if self.tiny else 384)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, as on GPUs; float32 for the tiny models, whose losses are then the more telling."""
        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def samples(self) -> list[Sample]:
        """The pictures that `make_workplace` drew, square, with captions that differ."""
        size = (self.resolution, self.resolution)
        return [
            Sample(
                f"{number:04d}",
                self.folder / f"set/{number:04d}-target.png",
                (self.folder / f"set/{number:04d}-control.png",) if edits_pictures(self.family_name) else (),
                " ".join([*(WORDS * (CAPTION_WORDS // 4)).split(), str(number)]),
                size,
            )
            for number in range(self.samples_made)
        ]

    def plan(self, store: Store | None = None, batching: Batching = "exact") -> Plan:
        """What is cached in `store` (by default this workplace's) and what is still to encode."""
        index = ContentIndex(self.folder / "content-index.json")
        place = store or self.store
        return make_plan(self.samples, self.family, self.sizes, self.model, self.dtype, place, index, batching=batching)


def make_workplace(folder: Path, family_name: str, tiny: bool, resolution: int | None, samples: int) -> Workplace:
    """Write the checkpoint and draw the pictures."""
    side = resolution or (TINY_RESOLUTION if tiny else RESOLUTION)
    place = Workplace(folder, family_name, tiny, side, samples)
    make_checkpoint(place.model, family_name, tiny)
    (folder / "set").mkdir(parents=True)
    rng = random.Random(0)
    for sample in place.samples:
        for path in (sample.target, *sample.controls):
            coarse = Image.frombytes("RGB", (16, 16), rng.randbytes(3 * 16 * 16))
            coarse.resize(sample.size, Image.Resampling.BICUBIC).save(path)
    return place


def edits_pictures(family_name: str) -> bool:
    """Whether the family needs a picture to edit."""
    try:
        get_family(family_name).artifacts(Sample("", Path("target.png"), (), "", (64, 64)), Sizes(64, 32))
    except DataError:
        return True
    return False


def device_name(device: str) -> str:
    """The GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, or was raised because of one that does."""
    return is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__))


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all GPU benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--family", default="qwen-image-edit-plus", help="qwen-image-edit-plus, flux, flux-kontext, ..."
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU: the same code in seconds")
    parser.add_argument("--device", help="by default the first GPU, with --tiny the CPU")
    parser.add_argument("--resolution", type=int, help="side of the square pictures; 1024, with --tiny 64")
    parser.add_argument("--samples", type=int, default=8, help="pictures that are drawn, cached and trained on")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing new is begun after so long")
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's folder for temporary files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results hold already")
    return parser


def device_of(wanted: argparse.Namespace) -> str:
    """Where to measure; ends the program where no GPU is there and the real sizes are asked for."""
    if wanted.device is not None:
        return str(wanted.device)
    if wanted.tiny:
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit("no GPU found; --tiny runs the same code on the CPU, --device names another device")
    return "cuda"


class Results:
    """Rows in a JSON file that is written anew after every row, so that an interrupted run loses nothing.

    Args:
        path: an existing file's rows are kept where `settings` are the same, unless `fresh`.
        settings: what all rows have in common.
    """

    def __init__(self, path: Path, settings: dict[str, Any], fresh: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "rows": [], "machine": vars(describe_machine())}
        if path.exists() and not fresh:
            before = json.loads(path.read_text())
            if before.get("settings") == settings:
                self.content = {**before, "machine": self.content["machine"]}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, each with its `row`: what was measured."""
        return list(self.content["rows"])

    def find(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The findings about `row`; None where there are none yet."""
        return next((one for one in self.rows if one["row"] == row), None)

    def add(self, row: dict[str, Any], findings: dict[str, Any]) -> None:
        """Add or replace the findings about `row`."""
        kept = [one for one in self.rows if one["row"] != row]
        self.put("rows", [*kept, {"row": row, **findings}])

    def put(self, name: str, value: Any) -> None:
        """Set a field beside the rows and write the file."""
        self.content[name] = value
        self.content["date"] = datetime.now().astimezone().isoformat(timespec="seconds")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(self.content, indent=2) + "\n")
        temporary.replace(self.path)


def results_path(folder: Path, what: str, place: Workplace, device: str) -> Path:
    """`training-flux-nvidia-h200.json`."""
    words = [what, place.family_name, *(["tiny"] if place.tiny else []), device_name(device)]
    return folder / (re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") + ".json")


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, its columns as wide as they need to be."""
    widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]
    align: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(heads) - 1)]
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(align, row, widths, strict=True))
        for row in [heads, *rows]
    )
