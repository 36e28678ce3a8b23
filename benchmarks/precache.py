"""What caching costs beside encoding itself, and how soon a second run is done.

    python benchmarks/precache.py [--samples 120] [--resolution 128] [--batch-size 8] [--rounds 5] [--unchanged 10000]

(a) The bundled model's VAE and text encoder go over the same pictures twice in every round: in a bare loop of
`Family.encode` whose tensors are dropped, and through an `EncoderSession` into a new store on disk. Both in one
process, in turns, with the encoders loaded beforehand. (b) A set whose records are all there is planned and "encoded"
once more, from the listing of its folder on, in a process of its own. Prints tables and adds them to
benchmarks/results/precache.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dittocache.data.digests import ContentIndex
from dittocache.data.sample import Sample
from dittocache.demo.edits import new_edits
from dittocache.demo.model import MODEL_DIR
from dittocache.demo.tiny import save_tiny
from dittocache.embeddings.encoding.encode import EncoderSession, EncodeSettings, encode_missing
from dittocache.embeddings.planning.plan import Need, Plan, make_plan
from dittocache.embeddings.store.store import Store
from dittocache.events import EventLog
from dittocache.families.base import Family, Sizes
from dittocache.families.registry import get_family
from dittocache.quality.machine import describe_machine
from plan import FAMILY, build_set, fill_store, planned

RESULTS = Path(__file__).parent / "results"
ENCODERS = ("vae", "text_encoder")
BATCHES_A_TURN = 3


class Loaded:
    """The family with its encoders in memory already: loading is no part of what is compared."""

    def __init__(self, family: Family, device: str, dtype: torch.dtype) -> None:
        self._family = family
        self._pipes = {
            encoder: family.load_pipeline(str(MODEL_DIR), [encoder, *family.encoders[encoder]], dtype, device)
            for encoder in ENCODERS
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def load_pipeline(self, model: str, components: list[str], *_: Any) -> Any:
        return self._pipes[components[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--unchanged", type=int, default=10_000, help="samples of the second run; 0 leaves it out")
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's folder for temporary files")
    wanted = parser.parse_args()
    report: dict[str, Any] = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": asdict(describe_machine()),
        "settings": {name: value for name, value in vars(wanted).items() if name != "folder"},
    }
    folder = Path(tempfile.mkdtemp(prefix="dittocache-precache-", dir=wanted.folder))
    try:
        if wanted.samples:
            report["encoding"] = compare(folder / "encode", wanted)
            print(encoding_table(report["encoding"]))
        if wanted.unchanged:
            report["second_run"] = second_run(folder / "again", wanted.unchanged)
            print(f"\nsecond run of {wanted.unchanged:,} unchanged samples: " + words_of(report["second_run"]))
    finally:
        shutil.rmtree(folder)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "precache.jsonl").open("a") as results:
        results.write(json.dumps(report) + "\n")


def compare(folder: Path, wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of the bare loop and of caching, by encoder."""
    samples = draw(folder / "set", wanted.samples, wanted.resolution)
    sizes = Sizes(wanted.resolution, wanted.resolution // 2)
    family: Any = Loaded(get_family(FAMILY), wanted.device, torch.float32)
    index = ContentIndex(folder / "content-index.json")
    rows = []
    for encoder in ENCODERS:
        rounds = []
        for number in range(wanted.rounds + 1):
            store = Store(folder / f"store-{number}")
            plan = make_plan(samples, family, sizes, MODEL_DIR, torch.float32, store, index)
            found = one_round(folder, plan, encoder, family, store, wanted, cached_first=bool(number % 2))
            shutil.rmtree(store.root)
            if number:  # the first round warms up
                rounds.append(found)
        rows.append({"encoder": encoder, "rounds": rounds, **summary(rounds)})
    return rows


def one_round(
    folder: Path,
    plan: Plan,
    encoder: str,
    family: Family,
    store: Store,
    wanted: argparse.Namespace,
    cached_first: bool,
) -> dict[str, float]:
    """Wall and CPU seconds of both ways over all samples.

    They take turns every few batches, so that another load on the machine meets both alike. Each turn of caching ends
    with everything on the disk, more often than a real run waits for it.
    """
    needs = plan.work(encoder)
    pipe = family.load_pipeline("", [encoder], torch.float32, wanted.device)
    log = EventLog(folder / "events.jsonl", "benchmark")
    settings = EncodeSettings(wanted.batch_size, wanted.num_workers)
    found = {"bare": 0.0, "bare_cpu": 0.0, "cached": 0.0, "cached_cpu": 0.0, "bytes": 0.0}
    portion = wanted.batch_size * BATCHES_A_TURN
    with EncoderSession(plan, encoder, family, wanted.device, store, log, settings) as session:
        for start in range(0, len(needs), portion):
            turn = needs[start : start + portion]

            def bare(turn: list[Need] = turn) -> None:
                for first in range(0, len(turn), wanted.batch_size):
                    batch = [need.sample for need in turn[first : first + wanted.batch_size]]
                    family.encode(pipe, encoder, batch, plan.sizes)

            def cached(turn: list[Need] = turn) -> None:
                result = session.encode(turn)
                assert result.samples == len(turn), "every sample must have passed the encoder"
                found["bytes"] += result.bytes_written

            ways = [("bare", bare), ("cached", cached)]
            for name, way in ways[::-1] if cached_first else ways:
                wall, cpu = time.perf_counter(), time.process_time()
                way()
                if wanted.device.startswith("cuda"):
                    torch.cuda.synchronize()
                found[name] += time.perf_counter() - wall
                found[f"{name}_cpu"] += time.process_time() - cpu
            cached_first = not cached_first
    return found


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """How much longer caching takes: the median of the rounds, of wall time and of CPU time."""
    return {
        "longer": statistics.median(one["cached"] / one["bare"] for one in rounds) - 1,
        "longer_cpu": statistics.median(one["cached_cpu"] / one["bare_cpu"] for one in rounds) - 1,
        "bare": sum(one["bare"] for one in rounds),
        "cached": sum(one["cached"] for one in rounds),
    }


def draw(folder: Path, count: int, resolution: int) -> list[Sample]:
    """Distinct edits, drawn as the bundled samples are, each with its control picture and instruction."""
    folder.mkdir(parents=True)
    samples = []
    for number, edit in enumerate(new_edits(count, held_out=False)):
        paths = []
        for word, picture in zip(("control", "target"), edit.images(), strict=True):
            paths.append(folder / f"{number:05d}-{word}.png")
            picture.resize((resolution, resolution)).save(paths[-1])
        samples.append(Sample(f"{number:05d}", paths[1], (paths[0],), edit.instruction, (resolution, resolution)))
    return samples


def second_run(folder: Path, samples: int) -> dict[str, float]:
    """Seconds of a run that finds everything there."""
    build_set(folder / "set", samples)
    save_tiny(folder / "model", FAMILY)
    time.sleep(3)  # files that were changed just now are read again by the next plan
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(fill_store, (folder,))
        pool.apply(run_again, (folder,))  # the first one after everything was written
    found: list[dict[str, float]] = []
    for _ in range(3):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(run_again, (folder,)))
    return min(found, key=lambda one: one["total"])


def run_again(folder: Path) -> dict[str, float]:
    """Plan, encode what is missing (nothing) and save the manifest, as a command does."""
    started = time.perf_counter()
    plan = planned(folder)
    planned_at = time.perf_counter()
    log = EventLog(folder / "events.jsonl", "cache")
    result = encode_missing(
        plan, [None, *ENCODERS], get_family(FAMILY), plan.model, plan.dtype, "cpu", 4, Store(folder / "cache"), log
    )
    encoded_at = time.perf_counter()
    assert result.encoded == 0, "everything must be there"
    plan.manifest.save(folder / "manifest.json")
    done = time.perf_counter()
    return {
        "plan": planned_at - started,
        "encode": encoded_at - planned_at,
        "manifest": done - encoded_at,
        "total": done - started,
    }


def encoding_table(rows: list[dict[str, Any]]) -> str:
    """Seconds of all rounds, and how much longer caching takes."""
    lines = [f"{'':14}{'bare s':>9}{'cached s':>10}{'longer':>9}{'median':>9}{'CPU':>9}{'MB a round':>12}"]
    for row in rows:
        megabytes = row["rounds"][0]["bytes"] / 1e6
        lines.append(
            f"{row['encoder']:14}{row['bare']:>9.2f}{row['cached']:>10.2f}{row['cached'] / row['bare'] - 1:>9.1%}"
            f"{row['longer']:>9.1%}{row['longer_cpu']:>9.1%}{megabytes:>12.1f}"
        )
    bare, cached = sum(row["bare"] for row in rows), sum(row["cached"] for row in rows)
    return "\n".join([*lines, f"{'both':14}{bare:>9.2f}{cached:>10.2f}{cached / bare - 1:>9.1%}"])


def words_of(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items())


if __name__ == "__main__":
    main()
