"""Runs of held-out edits with and without step caches, timed beside each other and remembered on disk."""

from __future__ import annotations

import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

import step_peers
from dittocache.demo.edits import evaluation_edits
from dittocache.demo.evaluate import generate
from dittocache.demo.model import load_pipeline
from dittocache.quality.calibration.fitting import calibrated
from dittocache.quality.calibration.recording import Subject, recorded
from dittocache.quality.metrics import capped, psnr, ssim
from dittocache.quality.metrics_flip import flip
from dittocache.teacache.profile import Calibration
from step_methods import Setting

GROUP = 12
"""Cached runs between two uncached ones."""


@dataclass(frozen=True)
class Made:
    """A picture, the wall seconds of its denoising loop, and step by step the processor's time and the passes."""

    picture: Image.Image
    wall: float
    step_seconds: list[float]
    step_passes: list[int]


@dataclass(frozen=True)
class Measured:
    """A setting on one edit.

    Attributes:
        wall, plain_wall: seconds of the denoising loop, and of the uncached runs before and after it.
        step_seconds: the processor's time of each step, all that is done between two steps of the solver included.
        step_passes: how often a block in the middle ran in each step.
        plain_passes: how often it ran in the uncached run.
    """

    method: str
    knob: float
    edit: int
    wall: float
    plain_wall: float
    step_seconds: list[float]
    step_passes: list[int]
    plain_passes: int
    psnr: float
    ssim: float
    flip: float


UNCACHED = Setting("no cache", 0, lambda pipe: nullcontext())


SEEN_BEFORE = (62, 63)
"""Edits for calibrations; the comparison is on those before them."""


class Bench:
    """The bundled model, the number of steps and the guidance of one comparison.

    Prompts and source pictures are encoded once an edit: no step cache touches that, and it is in no measured time.
    """

    def __init__(self, steps: int, guidance: float) -> None:
        self.pipe = load_pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = steps
        self._options = {"true_cfg_scale": guidance, **({"negative_prompt": " "} if guidance > 1 else {})}
        self._edit = -1
        self._ran = 0
        self._began = self._ended = 0.0
        self._marks: list[tuple[float, int]] = []
        self.pipe.mag_ratios = functools.cache(
            lambda: step_peers.mag_ratios(self.pipe, steps, lambda: self.make(SEEN_BEFORE[0]))
        )
        blocks = self.pipe.transformer.transformer_blocks
        blocks[len(blocks) // 2].attn.to_q.register_forward_hook(self._count)
        self._encoded: dict[Any, Any] = {}
        for name in ("encode_prompt", "_encode_vae_image"):
            setattr(self.pipe, name, self._once(name, getattr(self.pipe, name)))
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps = _with_note(scheduler.set_timesteps, self._loop_begins)
        scheduler.step = _with_note(scheduler.step, self._step_ends)

    def make(self, edit: int, steps: int | None = None) -> Made:
        """The edit's picture; its number is also its seed."""
        if edit != self._edit:
            self._edit, self._encoded = edit, {}
        wanted = evaluation_edits(edit + 1)[edit]
        source, count = wanted.images()[0], steps or self.steps
        picture = generate(self.pipe, source, wanted.instruction, edit, count, **self._options)
        pairs = list(pairwise(self._marks))
        seconds = [round(after[0] - before[0], 6) for before, after in pairs]
        return Made(picture, self._ended - self._began, seconds, [after[1] - before[1] for before, after in pairs])

    def calibrations(self) -> dict[Subject, Calibration]:
        """The distance gate's polynomials, fitted on edits of their own."""
        points = []
        for edit in SEEN_BEFORE:
            with recorded(self.pipe) as recording:
                self.make(edit)
            points += recording.points
        return calibrated(points, (), degree=4)

    def round(self, edit: int, settings: Sequence[Setting]) -> Iterator[list[Measured]]:
        """The settings on one edit, in an order of its own, an uncached run before and after every few of them."""
        order = random.Random(edit).sample(list(settings), len(settings))
        before = self.make(edit)
        for start in range(0, len(order), GROUP):
            group = []
            for setting in order[start : start + GROUP]:
                with setting.cache(self.pipe):
                    group.append((setting, self.make(edit, setting.steps)))
            after = self.make(edit)
            plain = (before, after)
            yield [self._measured(edit, setting, made, plain) for setting, made in [*group, (UNCACHED, after)]]
            before = after

    def _measured(self, edit: int, setting: Setting, made: Made, plain: tuple[Made, Made]) -> Measured:
        reference = plain[0].picture
        return Measured(
            method=setting.method,
            knob=setting.knob,
            edit=edit,
            wall=made.wall,
            plain_wall=statistics.mean(one.wall for one in plain),
            step_seconds=made.step_seconds,
            step_passes=made.step_passes,
            plain_passes=sum(plain[0].step_passes),
            psnr=capped(psnr(made.picture, reference)),
            ssim=ssim(made.picture, reference),
            flip=flip(made.picture, reference),
        )

    def _count(self, *_: Any) -> None:
        self._ran += 1

    def _once(self, name: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`encode`, remembered for the length of an edit; both branches' prompts are told apart by their text."""

        @functools.wraps(encode)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = (name, kwargs.get("prompt"))
            if key not in self._encoded:
                self._encoded[key] = encode(*args, **kwargs)
            return self._encoded[key]

        return remembered

    def _loop_begins(self) -> None:
        self._ran, self._began = 0, time.perf_counter()
        self._marks = [(time.process_time(), 0)]

    def _step_ends(self) -> None:
        self._ended = time.perf_counter()
        self._marks.append((time.process_time(), self._ran))


def _with_note(call: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    """`call`, and `note` behind it."""

    @functools.wraps(call)  # the pipeline reads its signature
    def noted(*args: Any, **kwargs: Any) -> Any:
        found = call(*args, **kwargs)
        note()
        return found

    return noted


class Ledger:
    """What was measured, a line of JSON each: an interrupted comparison goes on where it stopped."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.rows = [Measured(**json.loads(line)) for line in lines]

    def missing(self, settings: Sequence[Setting], edit: int) -> list[Setting]:
        """Those settings that this edit still lacks."""
        known = {(one.method, one.knob) for one in self.rows if one.edit == edit}
        return [one for one in settings if (one.method, one.knob) not in known]

    def complete(self, settings: Sequence[Setting]) -> list[Measured]:
        """What was measured of those edits that lack none of `settings` and the uncached runs."""
        whole = {one.edit for one in self.rows if not self.missing(settings, one.edit)}
        return [one for one in self.rows if one.edit in whole]

    def add(self, rows: Sequence[Measured]) -> None:
        """Remember, at once."""
        self.rows += rows
        with self._file.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def measure(
    bench: Callable[[], Bench], ledger: Ledger, settings: Sequence[Setting], edits: Sequence[int], ends: float
) -> None:
    """Measure what the ledger lacks, edit by edit; nothing is begun after `ends`, seconds of the monotonic clock."""
    for edit in edits:
        missing = ledger.missing(settings, edit)
        if not missing or time.monotonic() > ends:
            continue
        for rows in bench().round(edit, missing):
            ledger.add(rows)
            if time.monotonic() > ends:
                return
