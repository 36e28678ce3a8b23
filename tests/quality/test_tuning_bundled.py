"""Tuning on the bundled model: a choice that holds on edits that the search has not seen."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dittocache.demo.edits import Edit, evaluation_edits
from dittocache.demo.evaluate import generate
from dittocache.demo.model import load_pipeline
from dittocache.quality.tuning.measurement import Ledger
from dittocache.quality.tuning.settings import Setting, late_schedule
from dittocache.quality.tuning.target import Target
from dittocache.quality.tuning.tune import Tuned, tune
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.generate import Picture
from dittocache.sampling.session import cached

STEPS = 8


@dataclass
class Drawn:
    pipe: Any
    edit: Edit
    key: str

    def make(self, setting: Setting) -> Picture:
        with cached(self.pipe, setting.teacache, setting.reference_kv) as trace:
            began = time.perf_counter()
            steps = setting.steps or STEPS
            image = generate(self.pipe, self.edit.images()[0], self.edit.instruction, int(self.key), steps)
            return Picture(image, time.perf_counter() - began, trace)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, list[Drawn], Ledger]:
    pipe = load_pipeline()
    samples = [Drawn(pipe, edit, str(number)) for number, edit in enumerate(evaluation_edits(5))]
    ledger = Ledger(Path(tmp_path_factory.mktemp("ledger")))
    methods = [late_schedule(STEPS)]
    tuned = tune(Target.parse("psnr>=30"), "each", methods, samples[:2], samples[2:4], ledger, timed=1)
    return tuned, samples[4:], ledger


def test_it_holds_on_edits_that_it_has_not_seen(found: tuple[Tuned, list[Drawn], Ledger]) -> None:
    tuned, unseen, ledger = found
    assert tuned.best is not None
    measured = ledger.measure(tuned.best.setting, unseen)
    assert min(one.psnr for one in measured) >= 30
    assert all(one.speedup > 1 for one in measured)


def test_what_it_counts_is_what_ran(found: tuple[Tuned, list[Drawn], Ledger]) -> None:
    tuned, unseen, ledger = found
    (one,) = ledger.measure(Setting("plain", "", 4), unseen[:1])
    assert (one.passes, one.uncached_passes) == (4, STEPS)
    assert tuned.best is not None and tuned.best.wall is not None
    assert {point.samples for point in tuned.measured} == {2}


def test_kept_references_count_by_their_share_of_the_tokens(found: tuple[Tuned, list[Drawn], Ledger]) -> None:
    _, unseen, ledger = found
    frozen = Setting("frozen", "", reference_kv=ReferenceKVConfig(refresh=(0,)))
    (one,) = ledger.measure(frozen, unseen[:1])
    text = round(64 / (1 - (one.passes - 1) / (STEPS - 1)) - 128)  # of 64 noise and 64 reference tokens
    assert 10 < text < 40
    assert one.passes == pytest.approx(1 + (STEPS - 1) * (64 + text) / (128 + text))
    assert one.uncached_passes == STEPS
    assert 20 < one.psnr < 100
