"""Formats for cached samples: how fast each is written and read, warm and cold, as ratios to `.pt` files.

    python benchmarks/store.py [--samples 100] [--batch 8] [--rounds 5] [--folder DIR]

Samples have the shapes of Qwen-Image-Edit at 1024 x 1024. Every way of reading ends with whole batches `(B, ...)` in
memory, so a format that gives single tensors pays for collating them, as a training run does. The contenders take
turns; warm numbers are the best of the rounds. Cold means that the system was told to forget the files; where it cannot
be told, the cold numbers are left out. Prints a table and adds it to benchmarks/results/store.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dittocache.quality.machine import describe_machine
from store_contenders import Batches, Contender, Tensors, contenders

RESULTS = Path(__file__).parent / "results"
BASELINE = (".pt per key", "one thread")
LOADER = (".pt per key", "DataLoader, 2 workers")
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "image_latents": ((4096, 64), torch.bfloat16),
    "control_latents": ((4096, 64), torch.bfloat16),
    "prompt_embeds": ((1165, 3584), torch.bfloat16),
    "prompt_embeds_mask": ((1165,), torch.bool),
    "empty_prompt_embeds": ((1154, 3584), torch.bfloat16),
    "empty_prompt_embeds_mask": ((1154,), torch.bool),
    "img_shapes": ((2, 3), torch.int32),
}
Reader = Callable[[Batches], Iterator[Tensors]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where to write; by default the system's folder for temporary files"
    )
    parser.add_argument("--only", default="", help="leave out formats whose name does not contain this, .pt excepted")
    wanted = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dittocache-store-", dir=wanted.folder))
    try:
        report = measure(folder, wanted.samples, wanted.batch, wanted.rounds, wanted.only)
    finally:
        shutil.rmtree(folder)
    show(report)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "store.jsonl").open("a") as stream:
        stream.write(json.dumps(report) + "\n")


def measure(folder: Path, count: int, batch_size: int, rounds: int, only: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    samples = make_samples(count)
    formats, notes = contenders()
    formats = [one for one in formats if only in one.name or one.name == BASELINE[0]]
    size = sum(tensor.nbytes for sample in samples for tensor in sample.values())
    batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    writes = time_writing(folder, formats, samples, rounds=2)
    readers = {
        (one.name, way): reader for one in formats for way, reader in one.readers(folder / one.name, samples[0]).items()
    }
    for key in readers:
        check(key, readers[key], samples, batches)
    warm = time_warm(readers, batches, rounds)
    readers.clear()
    cold: dict[tuple[str, str], float] = {}
    if hasattr(os, "posix_fadvise"):
        cold = time_cold(folder, formats, list(warm), samples[0], batches)
    else:
        notes.append("this system cannot be told to forget files: no cold numbers")
    rows = [{"format": key[0], "way": key[1], "warm_seconds": warm[key], "cold_seconds": cold.get(key)} for key in warm]
    return {
        "date": datetime.now().astimezone().isoformat(),
        "machine": asdict(describe_machine()),
        "samples": count,
        "bytes": size,
        "batch": batch_size,
        "writing": [{"format": name, "fsync": fsync, "seconds": s} for (name, fsync), s in writes.items()],
        "reading": rows,
        "disk_seconds": cold.get(("disk", "sequential")),
        "notes": notes,
    }


def make_samples(count: int) -> list[Tensors]:
    """Different in every byte that matters, and quick to make."""
    generator = torch.Generator().manual_seed(0)
    whole = {
        name: torch.randn((shape[0] + count, *shape[1:]), generator=generator).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }
    return [
        {name: tensor[number : number + len(tensor) - count].clone() for name, tensor in whole.items()}
        for number in range(count)
    ]


def time_writing(
    folder: Path, formats: Sequence[Contender], samples: Sequence[Tensors], rounds: int
) -> dict[tuple[str, bool], float]:
    """Seconds, the best of the rounds; what is written last stays."""
    best: dict[tuple[str, bool], float] = {}
    for turn in range(rounds):
        for one in formats[:: -1 if turn % 2 else 1]:
            for fsync in [False] * one.plain + [True] * one.fsynced:
                shutil.rmtree(folder / one.name, ignore_errors=True)
                (folder / one.name).mkdir()
                one.prepare(folder / one.name, samples)
                os.sync()
                started = time.perf_counter()
                one.write(folder / one.name, samples, fsync)
                seconds = time.perf_counter() - started
                best[one.name, fsync] = min(seconds, best.get((one.name, fsync), seconds))
    return best


def check(key: tuple[str, str], reader: Reader, samples: Sequence[Tensors], batches: Batches) -> None:
    for numbers, batch in zip(batches[:2], reader(batches[:2]), strict=True):
        for row, number in enumerate(numbers):
            if not all(torch.equal(batch[name][row], tensor) for name, tensor in samples[number].items()):
                raise SystemExit(f"{key}: sample {number} did not come back as it was written")


def time_warm(readers: dict[tuple[str, str], Reader], batches: Batches, rounds: int) -> dict[tuple[str, str], float]:
    """Each reader has the files read once before they are read on time: together they may be too large for memory."""
    best: dict[tuple[str, str], float] = {}
    for turn in range(rounds):
        for key, reader in list(readers.items())[:: -1 if turn % 2 else 1]:
            run(reader, batches)
            seconds = run(reader, batches)
            best[key] = min(seconds, best.get(key, seconds))
    return best


def time_cold(
    folder: Path,
    formats: Sequence[Contender],
    keys: Sequence[tuple[str, str]],
    shapes: Tensors,
    batches: Batches,
    rounds: int = 2,
) -> dict[tuple[str, str], float]:
    best: dict[tuple[str, str], float] = {}

    def note(key: tuple[str, str], seconds: float) -> None:
        best[key] = min(seconds, best.get(key, seconds))

    named = {one.name: one for one in formats}
    for turn in range(rounds):
        for name, way in [("disk", "sequential"), *keys][:: -1 if turn % 2 else 1]:
            gc.collect()  # closes what is mapped into memory, which cannot be forgotten
            forget(folder / (name if name in named else BASELINE[0]))
            if name in named:
                note((name, way), run(named[name].readers(folder / name, shapes)[way], batches))
            else:
                note((name, way), read_through(folder / BASELINE[0]))
    return best


def run(reader: Reader, batches: Batches) -> float:
    """Seconds from the first request to the last batch; worker processes are running already."""
    stream = reader(batches)
    started = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Have the system drop the files' contents from memory."""
    os.sync()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_through(folder: Path) -> float:
    """Seconds that the disk needs for these bytes: one file after another, in large pieces."""
    buffer = memoryview(bytearray(8 << 20))
    started = time.perf_counter()
    for path in sorted(folder.rglob("*.pt")):
        descriptor = os.open(path, os.O_RDONLY)
        place = 0
        while got := os.preadv(descriptor, [buffer], place):
            place += got
        os.close(descriptor)
    return time.perf_counter() - started


def show(report: dict[str, Any]) -> None:
    count, size = report["samples"], report["bytes"]
    machine = report["machine"]
    print(f"\n{count} samples of {size / count / 1e6:.1f} MB on {machine['cpu']}, {machine['cores']} cores")
    seconds = {(row["format"], row["way"]): row for row in report["reading"]}
    base = seconds[BASELINE]

    def rate(value: float | None, against: float | None) -> str:
        if value is None or against is None:
            return f"{'-':>28}"
        return f"{count / value:>9.0f}/s {size / value / 1e6:>7.0f} MB/s {against / value:>5.2f}x"

    print(f"\n{'reading':52}{'warm':>26}{'cold':>28}")
    for (name, way), row in seconds.items():
        warm, cold = rate(row["warm_seconds"], base["warm_seconds"]), rate(row["cold_seconds"], base["cold_seconds"])
        print(f"{name + ', ' + way:50}{warm}{cold}")
    print(f"{'the disk itself, sequential':50}{'':28}{rate(report['disk_seconds'], base['cold_seconds'])}")
    print(f"\n{'writing':50}{'plain':>28}{'with fsync':>28}")
    writing = {(row["format"], row["fsync"]): row["seconds"] for row in report["writing"]}
    for name in dict.fromkeys(name for name, _ in writing):
        columns = (rate(writing.get((name, fsync)), writing[BASELINE[0], fsync]) for fsync in (False, True))
        print(f"{name:50}{''.join(columns)}")
    for (name, way), row in seconds.items():
        if name.startswith("dittocache"):
            ratio = seconds[LOADER]["warm_seconds"] / row["warm_seconds"]
            print(f"{name}, {way}: {ratio:.1f}x the samples/s of {LOADER[0]} through {LOADER[1]}, warm")
    for note in report["notes"]:
        print(note)


if __name__ == "__main__":
    main()
