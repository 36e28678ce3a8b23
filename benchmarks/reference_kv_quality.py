"""What the reference KV cache costs in picture quality, and what it saves, on the bundled model.

    python -m benchmarks.reference_kv_quality [--edits 32] [--steps 4 8 28] [--kinds zero live] [--minutes 30]

Every setting makes the same held-out edits with the same seeds; its pictures are compared with those of the run without
a cache: PSNR, SSIM, FLIP. Beside it stand the transformer's own seconds saved (of the process, so that a busy machine
does not count) and, from the steps that were taken, what theory says for 1024 x 1024 and one reference. `fewer plain
steps` is the honest baseline: it saves time too, and needs no cache.

Both kinds of model are the bundled one, which was trained as both: `zero`, references modulated at t = 0
(Qwen-Image-Edit-2511), and `live`, with the timestep (2509). Results are saved after every edit; started again, the
program goes on. Saves benchmarks/results/reference_kv_quality.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.reference_kv import Case
from PIL import Image

from dittocache.demo.edits import Edit, evaluation_edits
from dittocache.demo.evaluate import generate
from dittocache.demo.model import load_pipeline
from dittocache.quality.machine import describe_machine
from dittocache.quality.metrics import capped, psnr, ssim
from dittocache.quality.metrics_flip import flip
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.session import cached
from dittocache.sampling.trace import Trace
from dittocache.teacache.config import TeaCacheConfig

RESULTS = Path(__file__).parent / "results"
REAL = Case(noise=4096, reference=4096, text=260, width=3072)  # Qwen-Image-Edit, 1024 x 1024, one reference
TEACACHE = TeaCacheConfig(gate="error", error_tolerance=0.001)
KINDS = ("zero", "live")


@dataclass(frozen=True)
class Setting:
    """One way to make a picture; `steps` where it takes others than the uncached run."""

    name: str
    references: ReferenceKVConfig | None = None
    teacache: TeaCacheConfig | None = None
    steps: int | None = None


def settings(steps: int) -> Iterator[Setting]:
    """All ways at so many steps."""
    for speed in (1.5, 2):
        yield Setting(f"{round(steps / speed)} plain steps", steps=round(steps / speed))
    yield Setting("usual", ReferenceKVConfig())
    yield Setting("step 0 only", ReferenceKVConfig(refresh=(0,)))
    for every in (2, 3) if steps < 12 else (2, 4):
        if every <= steps // 2:
            yield Setting(f"every {every}", ReferenceKVConfig(refresh=every, extrapolate=False))
            yield Setting(f"every {every}, extrapolated", ReferenceKVConfig(refresh=every))
    if steps == 8:
        yield Setting("every 4, extrapolated", ReferenceKVConfig(refresh=4))
        yield Setting("steps 0, 2, 5, extrapolated", ReferenceKVConfig(refresh=(0, 2, 5)))
    for tolerance in (0.1, 0.2):
        config = ReferenceKVConfig(refresh="adaptive", drift_tolerance=tolerance)
        yield Setting(f"adaptive {tolerance:g}", config)
    if steps > 8:  # with fewer a step cache has nothing to skip
        yield Setting("TeaCache", teacache=TEACACHE)
        yield Setting("TeaCache, usual", ReferenceKVConfig(), TEACACHE)
        yield Setting("TeaCache, step 0 only", ReferenceKVConfig(refresh=(0,)), TEACACHE)
        yield Setting("TeaCache, every 2, extrapolated", ReferenceKVConfig(refresh=2), TEACACHE)


class Runs:
    """Makes edits with the model of one kind, and times its transformer."""

    def __init__(self, kind: str, edits: Sequence[Edit]) -> None:
        self.pipe = load_pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        for part in (self.pipe.transformer, *self.pipe.transformer.transformer_blocks):
            part.zero_cond_t = kind == "zero"
        self._edits = edits
        for name in ("encode_prompt", "_encode_vae_image"):
            setattr(self.pipe, name, self._once_an_edit(getattr(self.pipe, name)))
        self._number = -1
        self._seconds = self._began = 0.0
        self.pipe.transformer.register_forward_pre_hook(self._begin)
        self.pipe.transformer.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._began = time.process_time()

    def _end(self, *_: Any) -> None:
        self._seconds += time.process_time() - self._began

    def _once_an_edit(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that is called with the same arguments in every run of an edit."""
        found: dict[int, Any] = {}

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if self._number not in found:
                found.clear()
                found[self._number] = method(*args, **kwargs)
            return found[self._number]

        return remembered

    def run(self, number: int, steps: int, setting: Setting) -> tuple[Image.Image, float, Trace]:
        """Picture, seconds within the transformer, what the caches did."""
        self._seconds, self._number, edit = 0.0, number, self._edits[number]
        with cached(self.pipe, setting.teacache, setting.references) as trace:
            picture = generate(self.pipe, edit.images()[0], edit.instruction, number, setting.steps or steps)
        return picture, self._seconds, trace

    def measure(self, number: int, steps: int) -> dict[str, dict[str, float]]:
        """By setting, the figures of one edit against its uncached run."""
        plain, plain_seconds, _ = self.run(number, steps, Setting("plain"))
        found = {}
        for setting in settings(steps):
            picture, seconds, trace = self.run(number, steps, setting)
            found[setting.name] = {
                "psnr": capped(psnr(picture, plain)),
                "ssim": ssim(picture, plain),
                "flip": flip(picture, plain),
                "saving": 1 - seconds / plain_seconds,
                "saving_1024": 1 - cost(trace) / steps,
                "full": sum(one.decision == "computed" and one.references != "reused" for one in trace.steps),
                "reused": trace.references_reused,
                "skipped": trace.skipped,
            }
        return found


def cost(trace: Trace) -> float:
    """Steps taken, in full steps of `REAL`: a skipped one counts nothing, one with kept references a part."""
    part = 1 - REAL.saving(computed=0, steps=1)
    return trace.computed - trace.references_reused * (1 - part)


def summary(edits: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Means over the edits that were measured, a row a setting; the worst PSNR beside its mean."""
    rows = []
    for name in next(iter(edits.values())):
        found = [one[name] for one in edits.values() if name in one]
        means = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
        worst = min(one["psnr"] for one in found)
        median = statistics.median(one["saving"] for one in found)
        rows.append({"setting": name, "edits": len(found), **means, "saving": median, "psnr_worst": worst})
    return rows


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = [f"\n{name}, {rows[0]['edits']} edits", HEADS]
    for row in rows:
        pattern = f"{row['full']:.1f}/{row['reused']:.1f}/{row['skipped']:.1f}"
        numbers = f"{row['psnr']:8.1f}{row['psnr_worst']:8.1f}{row['ssim']:9.5f}{row['flip']:8.4f}"
        lines.append(f"{row['setting']:34}{pattern:>16}{numbers}{row['saving']:9.1%}{row['saving_1024']:9.1%}")
    return "\n".join(lines)


HEADS = f"{'setting':34}{'full/kept/skip':>16}{'PSNR':>8}{'worst':>8}{'SSIM':>9}{'FLIP':>8}{'saved':>9}{'at 1024':>9}"


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what is missing, save after every edit, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=32, help="held-out edits (default 32)")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 4, 28], help="denoising steps (8 4 28)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of model")
    parser.add_argument("--minutes", type=float, default=600.0, help="nothing new is begun after so long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    ends, edits = time.monotonic() + 60 * options.minutes, evaluation_edits(options.edits)
    path = options.results / "reference_kv_quality.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    runs = {kind: Runs(kind, edits) for kind in options.kinds}
    for number in range(options.edits):  # all cases of an edit, so that a run that is stopped has some of each
        for kind, steps in product(options.kinds, options.steps):
            case = report["cases"].setdefault(f"{kind}, {steps} steps", {"edits": {}, "rows": []})
            if str(number) in case["edits"] or time.monotonic() > ends:
                continue
            case["edits"][str(number)] = runs[kind].measure(number, steps)
            case["rows"] = summary(case["edits"])
            report["machine"] = asdict(describe_machine())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    for name, case in report["cases"].items():
        if case["rows"]:
            print(table(name, case["rows"]), flush=True)
    return report


if __name__ == "__main__":
    main()
