"""Training at the real sizes, with random weights: cached, mixed and live embeddings, side by side.

    python -m benchmarks.gpu.training [--family flux] [--rows cached live:batch=2 cached:base=fp8 ...]
    python -m benchmarks.gpu.training --tiny

The samples are encoded and stored first, and timed. Each row is then measured in a process of its own: seconds a step,
samples a second, most memory allocated, beside what the library's memory plan foresaw. Where memory runs out, the row
says where. Results are saved after every row; started again, the program goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.training_row import Row, cache_samples, train_row
from benchmarks.gpu.workplace import (
    Results,
    Workplace,
    columns,
    common_arguments,
    device_of,
    make_workplace,
    results_path,
)

Task = Callable[[Workplace, Row | None, str, float | None, float], dict[str, Any]]
ROWS = (  # the most telling ones first: time may run out
    "cached",
    "live",
    "mixed",
    "cached:deterministic=1,steps=4",
    "live:deterministic=1,steps=4",
    "cached:base=fp8",
    "live:base=fp8",
    "cached:base=fp8,offload=1",
    "cached:batch=4",
    "live:batch=4",
    "cached:checkpointing=0",
    "live:checkpointing=0",
    "cached:batch=2",
    "live:batch=2",
)
EPOCH_SAMPLES = 1000  # of a data set for which epoch times are told
CLAIM = "claimed elsewhere, with no method given: 2 to 3 times as fast, 30 to 50 % less memory"
PATIENCE = 60.0  # seconds that a row may take beyond the time given


def main(words: Sequence[str], carry_out: Task | None = None) -> Results:
    wanted = parser().parse_args(words)
    device, carry_out = device_of(wanted), carry_out or in_a_process
    rows = [parse_row(text, wanted.steps) for text in wanted.rows]
    ends = time.monotonic() + 60 * wanted.minutes
    with tempfile.TemporaryDirectory(prefix="dittocache-gpu-", dir=wanted.folder) as folder:
        place = make_workplace(Path(folder), wanted.family, wanted.tiny, wanted.resolution, wanted.samples)
        results = Results(results_path(wanted.results, "training", place, device), _common(place, wanted), wanted.fresh)
        print(f"caching {wanted.samples} samples", file=sys.stderr, flush=True)
        results.put("caching", carry_out(place, None, device, wanted.memory, ends - time.monotonic()))
        if "failed" in results.content["caching"]:
            raise SystemExit(f"caching: {results.content['caching']['failed']}")
        for row in rows:
            if results.find(asdict(row)) is not None:
                continue
            if time.monotonic() > ends:
                print(f"no time left for: {row}; start again to go on", file=sys.stderr, flush=True)
                continue
            print(str(row), file=sys.stderr, flush=True)
            results.add(asdict(row), carry_out(place, row, device, wanted.memory, ends - time.monotonic()))
            results.put("summary", summary(results))
    print(table(results))
    return results


def parser() -> argparse.ArgumentParser:
    """The program's options."""
    options = common_arguments(__doc__)
    options.add_argument("--rows", nargs="+", default=ROWS, metavar="WAY[:SETTING=VALUE,...]", help="what to measure")
    options.add_argument("--steps", type=int, default=8, help="steps of a row that does not say its own")
    options.add_argument("--memory", type=float, help="gigabytes that may be used of the GPU, to try a smaller one")
    return options


def parse_row(text: str, steps: int) -> Row:
    """`live:batch=4,base=fp8,checkpointing=0` as a Row; raises SystemExit for what is no row."""
    way, _, settings = text.partition(":")
    kinds: dict[str, Callable[[str], Any]] = {
        "batch": int,
        "steps": int,
        "base": str,
        "checkpointing": lambda value: bool(int(value)),
        "offload": lambda value: bool(int(value)),
        "deterministic": lambda value: bool(int(value)),
    }
    row = Row(way, steps=steps)
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        if name not in kinds:
            raise SystemExit(f"--rows {text}: there is no setting {name!r}; there are {', '.join(kinds)}")
        row = replace(row, **{name: kinds[name](value)})
    if row.way not in ("cached", "mixed", "live") or row.base not in ("none", "fp8"):
        raise SystemExit(f"--rows {text}: expected cached, mixed or live, and base=none or base=fp8")
    return row


def in_a_process(place: Workplace, row: Row | None, device: str, memory: float | None, left: float) -> dict[str, Any]:
    """Caching (without `row`) or a row, in a process of its own, so that its memory is its own."""
    answer = place.folder / "answer.json"
    answer.unlink(missing_ok=True)
    work = {"place": {**asdict(place), "folder": str(place.folder)}, "device": device, "memory": memory}
    task = json.dumps({**work, "row": None if row is None else asdict(row), "answer": str(answer)})
    command = [sys.executable, "-m", "benchmarks.gpu.training", "--task", task]
    try:
        ended = subprocess.run(command, check=False, timeout=max(left, 0) + PATIENCE)
    except subprocess.TimeoutExpired:
        return {"failed": "no time left"}
    if not answer.exists():
        killed = " (killed, probably for want of the machine's memory)" if ended.returncode == -9 else ""
        return {"failed": f"the process ended with {ended.returncode}{killed}"}
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def task(text: str) -> None:
    """What `in_a_process` asks its process to do."""
    work = json.loads(text)
    place = Workplace(**{**work["place"], "folder": Path(work["place"]["folder"])})
    if work["memory"] is not None and work["device"].startswith("cuda"):
        whole = torch.cuda.get_device_properties(work["device"]).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, work["memory"] * 1e9 / whole))
    row, device = work["row"], work["device"]
    found = cache_samples(place, device) if row is None else train_row(place, Row(**row), device)
    Path(work["answer"]).write_text(json.dumps(found))


def summary(results: Results) -> list[dict[str, Any]]:
    """For every setting measured in more than one way: what cached saves over live, and whether losses agree."""
    caching = results.content["caching"]
    encoding = caching["seconds"] / caching["samples"] * EPOCH_SAMPLES
    by_setting: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for one in results.rows:
        if "losses" in one:
            row = Row(**one["row"])
            by_setting.setdefault(row.setting, {})[row.way] = one
    found = []
    for ways in by_setting.values():
        cached, live = ways.get("cached"), ways.get("live")
        if cached is None or len(ways) < 2:
            continue
        epochs = {way: EPOCH_SAMPLES / one["samples_per_second"] for way, one in ways.items()}
        entry: dict[str, Any] = {
            "row": {name: value for name, value in cached["row"].items() if name != "way"},
            "epoch_seconds": epochs,
            "first_epoch_with_caching_seconds": encoding + epochs["cached"],
            "first_losses_identical": len({one["losses"][0] for one in ways.values()}) == 1,
            "losses_identical": all(one["losses"] == cached["losses"] for one in ways.values()),
        }
        if live is not None:
            entry["speedup"] = live["seconds_per_step"] / cached["seconds_per_step"]
            entry["memory_saved"] = 1 - cached["peak_bytes"] / live["peak_bytes"]
            saved = epochs["live"] - epochs["cached"]
            entry["epochs_until_caching_pays"] = encoding / saved if saved > 0 else None
            entry["embeddings_identical"] = live["embeddings_identical"]
        found.append(entry)
    return found


def table(results: Results) -> str:
    """The rows for a terminal, and what follows from them."""
    heads = ("", "s/step", "samples/s", "loading", "peak GB", "planned GB", "last loss")
    lines = [columns(heads, [_cells(one) for one in results.rows])]
    caching = results.content["caching"]
    lines.append(f"caching: {caching['seconds'] / caching['samples']:.3f} s a sample, most {_gb(caching)} GB")
    for one in results.content.get("summary", []):
        if "speedup" not in one:
            continue
        about = str(Row("cached", **one["row"])).partition(", ")[2]
        losses = "all losses" if one["losses_identical"] else "first losses" if one["first_losses_identical"] else "NO"
        lines.append(
            f"{about}: cached {one['speedup']:.2f}x as fast as live, {one['memory_saved']:.0%} less memory; "
            f"identical: {losses}, {'' if one['embeddings_identical'] else 'NOT the '}embeddings"
        )
    return "\n".join([*lines, CLAIM, f"results: {results.path}"])


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    name = str(Row(**one["row"]))
    if "failed" in one:
        return (name, one["failed"], *[""] * 5)
    if "out_of_memory" in one:
        return (name, f"out of memory: {one['out_of_memory']}", "", "", _gb(one), "", "")
    return (
        name,
        f"{one['seconds_per_step']:.3f}",
        f"{one['samples_per_second']:.3f}",
        f"{one['load_share']:.1%}",
        _gb(one),
        f"{one['memory_plan']['device_total'] / 1e9:.2f}",
        f"{one['losses'][-1]:.6f}",
    )


def _gb(one: dict[str, Any]) -> str:
    return f"{one['peak_bytes'] / 1e9:.2f}"


def _common(place: Workplace, wanted: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a results file have in common."""
    return {
        "family": place.family_name,
        "tiny": place.tiny,
        "resolution": place.resolution,
        "samples": place.samples_made,
        "dtype": str(place.dtype),
        "memory_limit_gb": wanted.memory,
        "epoch_samples": EPOCH_SAMPLES,
        "claim": CLAIM,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        task(sys.argv[2])
    else:
        main(sys.argv[1:])
