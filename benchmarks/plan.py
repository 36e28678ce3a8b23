"""What planning costs: a first plan, one of an unchanged data set, and one with 100 samples changed.

    python benchmarks/plan.py [--samples 100000] [--rounds 3] [--folder DIR]

The set has one control picture and a caption for each sample; the model is a tiny Qwen-Image-Edit-Plus, whose keys are
made as those of the real one. Every plan starts from nothing but the files, and is timed from the listing of the folder
to the plan in words, with loose records and with packed ones; starting Python and importing torch and diffusers is left
out. Prints a table and adds it to benchmarks/results/plan.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dittocache.data import folder as folder_module
from dittocache.data.config import SetConfig
from dittocache.data.digests import ContentIndex
from dittocache.data.file_table import FileTable
from dittocache.data.folder import load_folder
from dittocache.data.sample import Sample
from dittocache.demo.tiny import save_tiny
from dittocache.embeddings.planning import memory as memory_module
from dittocache.embeddings.planning import plan as plan_module
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.store.packing import pack_records
from dittocache.embeddings.store.record import pack
from dittocache.embeddings.store.store import Store
from dittocache.families.base import Sizes
from dittocache.families.registry import get_family
from dittocache.quality.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
FAMILY = "qwen-image-edit-plus"
SIZES = Sizes(64, 32)
CHANGED = 100
PARTS: list[tuple[str, Any, str]] = [
    ("scan", FileTable, "scanned"),
    ("files known", folder_module, "remembered"),
    ("files known", FileTable, "learn"),
    ("files read", FileTable, "read_sizes"),
    ("files read", FileTable, "read_digests"),
    ("previous manifest", Manifest, "load"),
    ("encoders", plan_module, "encoder_identity"),
    ("keys known", memory_module, "_remembered"),
    ("keys known", memory_module.KeyMemory, "load"),
    ("keys checked", memory_module, "_holds"),
    ("saving", folder_module, "remember"),
    ("saving", plan_module, "remember"),
    ("saving", memory_module.KeyMemory, "save"),
    ("look-up", plan_module, "record_lengths"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many unchanged plans counts")
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's folder for temporary files")
    wanted = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dittocache-plan-", dir=wanted.folder))
    try:
        print(f"{wanted.samples:,} samples; seconds of one process\n")
        report = {
            "date": datetime.now().isoformat(timespec="seconds"),
            "machine": asdict(describe_machine()),
            "samples": wanted.samples,
            "plans": measure(folder, wanted.samples, wanted.rounds),
        }
    finally:
        shutil.rmtree(folder)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "plan.jsonl").open("a") as results:
        results.write(json.dumps(report) + "\n")


def measure(folder: Path, samples: int, rounds: int) -> list[dict[str, Any]]:
    """Build the set, plan it, fill the store, and plan again and again."""
    build_set(folder / "set", samples)
    save_tiny(folder / "model", FAMILY)
    probe = Sample("probe", folder / "t", (folder / "c",), "", (64, 64))
    get_family(FAMILY).artifacts(probe, SIZES, lambda _: (8, 8))  # imports diffusers' pipeline
    time.sleep(3)  # files that were changed just now are read again by the next plan
    found = [show({"plan": "first, empty store", **plan_once(folder)})]
    fill_store(folder)
    for store in ("loose", "packed"):
        found += plans_of(folder, store, samples, rounds)
        if store == "loose":
            pack_records(Store(folder / "cache"))
    return found


def plans_of(folder: Path, store: str, samples: int, rounds: int) -> list[dict[str, Any]]:
    plan_once(folder)  # the first one after everything was written
    unchanged = min((plan_once(folder) for _ in range(rounds)), key=lambda one: one["seconds"])
    change_some(folder / "set", samples, store)
    changed = plan_once(folder)
    return [
        show({"plan": f"unchanged, {store}", **unchanged}),
        show({"plan": f"{CHANGED} changed, {store}", **changed}),
    ]


def build_set(folder: Path, samples: int) -> None:
    """Tiny pictures that differ, and captions."""
    for name in ("images", "control"):
        (folder / name).mkdir(parents=True)
    picture = png(8, 8)
    for number in range(samples):
        name = f"{number:07d}"
        (folder / "images" / f"{name}.png").write_bytes(picture + f"target {number}".encode())
        (folder / "control" / f"{name}.png").write_bytes(picture + f"control {number}".encode())
        (folder / "images" / f"{name}.txt").write_text(f"paint the house number {number} in another colour")


def change_some(folder: Path, samples: int, word: str) -> None:
    """Other captions for half of the changed samples, other pictures for the rest."""
    for number in range(0, samples, max(1, samples // CHANGED)):
        if number % 2:
            (folder / f"images/{number:07d}.txt").write_text(f"{word}: do nothing to number {number}")
        else:
            (folder / f"images/{number:07d}.png").write_bytes(png(8, 8) + f"{word} {number}".encode())


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(3 * width)) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def plan_once(folder: Path) -> dict[str, Any]:
    """One plan as a command makes it, with the seconds of its parts."""
    seconds: dict[str, float] = {}
    with parts_timed(seconds):
        started = time.perf_counter()
        plan = planned(folder)
        words = plan.describe()
        total = time.perf_counter() - started
    saving = time.perf_counter()
    plan.manifest.save(folder / "manifest.json")
    seconds["(manifest saved, not counted)"] = time.perf_counter() - saving
    seconds["other"] = total - sum(value for name, value in seconds.items() if not name.startswith("("))
    return {"seconds": total, "parts": seconds, "hits": plan.hits, "misses": plan.misses, "words": words}


def planned(folder: Path) -> Plan:
    family = get_family(FAMILY)
    config = SetConfig(path=folder / "set", resolution=SIZES.resolution)
    samples = load_folder(config, family.size_multiple, folder / "cache/memory")
    manifest = folder / "manifest.json"
    return make_plan(
        samples,
        family,
        SIZES,
        folder / "model",
        torch.bfloat16,
        Store(folder / "cache"),
        ContentIndex(folder / "cache/content-index.json"),
        previous=Manifest.load(manifest) if manifest.exists() else None,
    )


def fill_store(folder: Path) -> None:
    """A loose record for every key, without waiting for the disk."""
    plan = planned(folder)
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    store = Store(folder / "cache")
    store.write((first := next(iter(plan.manifest.recipes))), tensor, plan.recipe(first))
    for prefix in range(256):
        (folder / f"cache/objects/{prefix:02x}").mkdir(exist_ok=True)
    for miss in plan.missed:
        path = folder / f"cache/objects/{miss.key[:2]}/{miss.key}.safetensors"
        path.write_bytes(pack(miss.key, tensor, plan.recipe(miss.key)))


@contextmanager
def parts_timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time that each of `PARTS` takes."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

        return call

    stock = [(owner, attribute, vars(owner)[attribute]) for _, owner, attribute in PARTS]
    for name, owner, attribute in PARTS:
        function = timed(name, getattr(owner, attribute))
        is_method = isinstance(owner, type) and isinstance(vars(owner)[attribute], classmethod)
        setattr(owner, attribute, staticmethod(function) if is_method else function)
    try:
        yield
    finally:
        for owner, attribute, function in stock:
            setattr(owner, attribute, function)


def show(found: dict[str, Any]) -> dict[str, Any]:
    """Print one plan's seconds as soon as they are known."""
    print(f"{found['plan']:<36}{found['seconds']:8.2f}   {found['hits']:,} hits, {found['misses']:,} misses")
    for name, value in found["parts"].items():
        print(f"    {name:<32}{value:8.2f}", flush=True)
    return found


if __name__ == "__main__":
    main()
