"""What the encoders give at their real sizes, with random weights: samples a second, alone and while caching.

    python -m benchmarks.gpu.caching [--family flux] [--batches 1 4 8] [--samples 16]
    python -m benchmarks.gpu.caching --tiny

For each encoder, batch size and way of batching (`exact`: one by one, as the pipeline does; `together`: one call for
the batch) the same samples pass three times: through the encoder alone, with pictures decoded beforehand; with
pictures decoded in line; and through the library's caching, which decodes ahead and stores beside the encoder's work.
Where memory runs out, the row says so. Results are saved after every row; started again, the program goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from benchmarks.gpu.workplace import (
    Results,
    Workplace,
    columns,
    common_arguments,
    device_of,
    make_workplace,
    ran_out_of_memory,
    results_path,
    synchronize,
)
from PIL import Image

from dittocache.embeddings.encoding.memory import free_memory
from dittocache.embeddings.encoding.session import EncoderSession, EncodeSettings
from dittocache.embeddings.encoding.tasks import Task, in_order, make_tasks
from dittocache.embeddings.planning.plan import Plan
from dittocache.embeddings.store.store import Store
from dittocache.events import EventLog
from dittocache.families.base import Batching
from dittocache.families.pictures import PictureRequest, resized_picture

WAYS: tuple[Batching, ...] = ("exact", "together")


class Loaded:
    """The family with one encoder in memory already: building random weights is no part of what is timed."""

    def __init__(self, place: Workplace, encoder: str, device: str) -> None:
        self._family = place.family
        components = [encoder, *self._family.encoders[encoder]]
        self.pipe = self._family.load_pipeline(str(place.model), components, place.dtype, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def load_pipeline(self, *_: Any) -> Any:
        """The pipeline that is loaded already."""
        return self.pipe


def main(words: Sequence[str]) -> Results:
    wanted = parser().parse_args(words)
    device = device_of(wanted)
    ends = time.monotonic() + 60 * wanted.minutes
    with tempfile.TemporaryDirectory(prefix="dittocache-gpu-", dir=wanted.folder) as folder:
        place = make_workplace(Path(folder), wanted.family, wanted.tiny, wanted.resolution, wanted.samples)
        settings = {
            "family": place.family_name,
            "tiny": place.tiny,
            "resolution": place.resolution,
            "samples": place.samples_made,
            "num_workers": wanted.num_workers,
            "dtype": str(place.dtype),
        }
        results = Results(results_path(wanted.results, "caching", place, device), settings, wanted.fresh)
        for encoder in place.family.encoders:
            rows = [
                {"encoder": encoder, "batching": batching, "batch": batch}
                for batching in WAYS
                for batch in wanted.batches
            ]
            missing = [row for row in rows if results.find(row) is None]
            if not missing or time.monotonic() > ends:
                continue
            loaded = Loaded(place, encoder, device)
            warm_up(place, loaded, encoder, device)
            for row in missing:
                if time.monotonic() > ends:
                    print(f"no time left for: {row}; start again to go on", file=sys.stderr, flush=True)
                    break
                results.add(row, measured(place, loaded, row, device, wanted.num_workers))
                print("  ".join(_cells(results.rows[-1])), file=sys.stderr, flush=True)
            del loaded
            free_memory()
    print(table(results))
    return results


def parser() -> argparse.ArgumentParser:
    """The program's options."""
    options = common_arguments(__doc__)
    options.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4, 8], help="samples that an encoder gets at once"
    )
    options.add_argument("--num-workers", type=int, default=min(8, os.cpu_count() or 1), help="decoding processes")
    return options


def warm_up(place: Workplace, loaded: Loaded, encoder: str, device: str) -> None:
    """The first call allocates and chooses kernels."""
    with _out_of_memory_is_found({}):
        loaded.encode(loaded.pipe, encoder, place.samples[:1], place.sizes)
        synchronize(device)


def measured(place: Workplace, loaded: Loaded, row: dict[str, Any], device: str, num_workers: int) -> dict[str, Any]:
    """Samples a second of the three passes, most memory allocated, bytes stored; or where memory ran out."""
    found: dict[str, Any] = {}
    folder = place.folder / "measured-cache"
    shutil.rmtree(folder, ignore_errors=True)
    plan = place.plan(Store(folder), row["batching"])
    tasks = make_tasks(in_order(plan.work(row["encoder"]), row["encoder"]), lambda key: False, ())
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with _out_of_memory_is_found(found):
        decoded = _decoded(place, loaded, row["encoder"])
        found["alone"] = _speed(device, loaded, place, row, tasks, decoded.__getitem__)
        found["in_line"] = _speed(device, loaded, place, row, tasks, resized_picture)
        found |= _cached(place, loaded, plan, Store(folder), row, device, num_workers)
    if device.startswith("cuda"):
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def table(results: Results) -> str:
    """The rows for a terminal."""
    heads = ("", "encoder alone /s", "decoding in line /s", "cached /s", "MB/s stored", "peak GB")
    return "\n".join([columns(heads, [_cells(one) for one in results.rows]), f"results: {results.path}"])


def _speed(
    device: str,
    loaded: Loaded,
    place: Workplace,
    row: dict[str, Any],
    tasks: Sequence[Task],
    pictures: Callable[[PictureRequest], Image.Image],
) -> float:
    """Samples a second of a bare loop over what caching would compute; the tensors are dropped."""
    synchronize(device)
    started = time.perf_counter()
    for start in range(0, len(tasks), row["batch"]):
        batch = tasks[start : start + row["batch"]]
        loaded.encode(
            loaded.pipe,
            row["encoder"],
            [task.sample for task in batch],
            place.sizes,
            wanted=[task.keys.keys() for task in batch],
            pictures=pictures,
            together=row["batching"] == "together",
        )
    synchronize(device)
    return len(tasks) / (time.perf_counter() - started)


def _cached(
    place: Workplace, loaded: Loaded, plan: Plan, store: Store, row: dict[str, Any], device: str, num_workers: int
) -> dict[str, Any]:
    """The library's way from pictures to records on the disk, all of them durable at the end."""
    settings = EncodeSettings(row["batch"], num_workers)
    log = EventLog(place.folder / "events.jsonl", "cache")
    with EncoderSession(plan, row["encoder"], cast(Any, loaded), device, store, log, settings) as session:
        started = time.perf_counter()
        result = session.encode(plan.work(row["encoder"]))
        seconds = time.perf_counter() - started
    return {
        "cached": result.samples / seconds,
        "bytes_stored": result.bytes_written,
        "stored_bytes_per_second": result.bytes_written / seconds,
    }


def _decoded(place: Workplace, loaded: Loaded, encoder: str) -> dict[PictureRequest, Image.Image]:
    requests = [one for sample in place.samples for one in loaded.pictures(encoder, sample, place.sizes)]
    return {one: resized_picture(one) for one in requests}


@contextmanager
def _out_of_memory_is_found(found: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        found["out_of_memory"] = str(error).splitlines()[0]
        free_memory()


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    row = one["row"]
    speeds = [f"{one[name]:.2f}" if name in one else "out of memory" for name in ("alone", "in_line", "cached")]
    stored = f"{one['stored_bytes_per_second'] / 1e6:.1f}" if "stored_bytes_per_second" in one else ""
    peak = f"{one['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in one else ""
    return (f"{row['encoder']}, {row['batching']}, batch {row['batch']}", *speeds, stored, peak)


if __name__ == "__main__":
    main(sys.argv[1:])
