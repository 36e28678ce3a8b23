"""The search on made-up models whose best setting is known, and the ledger that keeps what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dittocache.quality.metrics import psnr
from dittocache.quality.tuning.curve import plot_curve, point_of, table
from dittocache.quality.tuning.measurement import Ledger, Measurement
from dittocache.quality.tuning.pareto import pareto
from dittocache.quality.tuning.search import harshest, mildest, search
from dittocache.quality.tuning.settings import PLAIN, UNCACHED, Method, Setting, all_methods, plain_steps, spread
from dittocache.quality.tuning.target import Target
from dittocache.quality.tuning.tune import tune
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.generate import Picture
from dittocache.sampling.trace import StepRecord, Trace
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.profile import Calibration

STEPS = 20


def cache_of(computed: int) -> TeaCacheConfig:
    return TeaCacheConfig(gate="schedule", schedule=tuple(range(computed)))


def method(name: str = "made up") -> Method:
    counts = range(STEPS - 1, 3, -1)
    return Method(name, [Setting(name, f"{count} computed", teacache=cache_of(count)) for count in counts])


@dataclass
class Made:
    """A sample whose noise grows with the steps left out: `loss` levels a step with a cache, `plain` without."""

    key: str
    loss: float = 1.0
    plain: float = 2.0
    asked: list[Setting] = field(default_factory=list)
    stop_after: int | None = None

    def make(self, setting: Setting) -> Picture:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(setting)
        if setting.teacache is not None:
            computed, loss = len(setting.teacache.schedule or ()), self.loss
        else:
            computed, loss = setting.steps or STEPS, self.plain
        level = round(loss * (STEPS - computed))
        noise = np.random.default_rng(1).choice([-level, level], (16, 16, 3))
        picture = Image.fromarray((128 + noise).astype(np.uint8))
        trace = Trace()
        trace.steps = [StepRecord(1, step, "cond", "computed", "", None, None, 0.01) for step in range(computed)]
        return Picture(picture, 0.1 * computed, trace)


def samples(count: int = 4, prefix: str = "s", **made: float) -> list[Made]:
    return [Made(f"{prefix}{number}", **made) for number in range(count)]


@given(st.lists(st.booleans(), max_size=40))
def test_bisection_finds_the_limit(values: list[bool]) -> None:
    falling = sorted(values, reverse=True)
    asked: list[int] = []

    def keeps(index: int) -> bool:
        asked.append(index)
        return falling[index]

    assert harshest(len(falling), keeps) == (falling.count(True) - 1 if True in falling else None)
    assert len(asked) <= len(falling).bit_length()
    rising = falling[::-1]
    assert mildest(len(rising), lambda index: rising[index]) == (rising.index(True) if True in rising else None)


def test_the_fastest_setting_that_keeps_to_the_target_is_chosen(tmp_path: Path) -> None:
    ledger, some = Ledger(tmp_path), samples()
    (found,) = search([method()], Target.parse("psnr>=28"), "each", lambda setting: ledger.measure(setting, some))
    # A level of n is 20 log10(255 / n) dB: 28.13 for 10, 27.3 for 11.
    assert found.setting.knob == "10 computed"
    assert found.speedup == 2.0


def test_for_a_speed_it_takes_no_harsher_setting_than_needed(tmp_path: Path) -> None:
    found = tune(Target.parse("speedup>=1.9"), "each", [method()], samples(), samples(prefix="h"), Ledger(tmp_path))
    assert found.best is not None and found.best.setting.knob == "10 computed"  # 20 / 11 would be 1.82


def test_where_fewer_plain_steps_beat_a_cache_it_says_so(tmp_path: Path) -> None:
    methods = [plain_steps(STEPS), method()]
    worse = {"loss": 2.0, "plain": 1.0}
    found = tune(
        Target.parse("psnr>=28"), "each", methods, samples(**worse), samples(prefix="h", **worse), Ledger(tmp_path)
    )
    assert found.best is not None and found.best.setting == Setting(PLAIN, "10 steps", 10)
    assert found.cache is not None and found.cache.setting.knob == "15 computed"
    assert "Fewer plain steps beat every cache here (no better is made up, 15 computed)" in found.words


def test_a_cache_is_shown_beside_the_plain_steps_it_beats(tmp_path: Path) -> None:
    methods = [plain_steps(STEPS), method()]
    found = tune(Target.parse("psnr>=28"), "each", methods, samples(), samples(prefix="h"), Ledger(tmp_path))
    assert found.best is found.cache is not None
    assert "Without a cache: 15 steps, 1.33x" in found.words
    assert found.best.wall == pytest.approx(2.0)


def test_a_target_out_of_reach_leaves_the_cache_off(tmp_path: Path) -> None:
    found = tune(Target.parse("psnr>=90"), "each", [method()], samples(), samples(prefix="h"), Ledger(tmp_path))
    assert found.best is None and found.cache is None
    assert found.words == "no setting keeps to psnr>=90; leave the step cache off"


def test_held_out_pictures_can_refuse_a_setting(tmp_path: Path) -> None:
    hard = [*samples(3, "h"), Made("hard", loss=2.0)]
    found = tune(Target.parse("psnr>=28"), "each", [method()], samples(), hard, Ledger(tmp_path))
    assert found.best is not None and found.best.refused > 0
    assert min(one.psnr for one in found.best.held_out) >= 28
    assert min(psnr(hard[3].make(found.best.setting).image, hard[3].make(UNCACHED).image), 100) >= 28


def test_nothing_is_run_twice_also_by_the_next_process(tmp_path: Path) -> None:
    first, others = samples(), samples(prefix="h")
    target = Target.parse("psnr>=28")
    before = tune(target, "each", [method()], first, others, Ledger(tmp_path), timed=0)
    asked = [setting.key for setting in first[0].asked]
    assert len(asked) == len(set(asked))
    again = [samples(), samples(prefix="h")]
    ledger = Ledger(tmp_path)
    after = tune(target, "each", [method()], *again, ledger, timed=0)
    assert after == before
    assert ledger.made == 0 and not any(sample.asked for group in again for sample in group)


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    target, one = Target.parse("psnr>=28"), Made("s3", stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        tune(target, "each", [method()], [*samples(3), one], samples(prefix="h"), Ledger(tmp_path))
    with (tmp_path / "measurements.jsonl").open("a") as stream:
        stream.write('{"setting": "torn')  # a process that was killed in mid-line
    some, ledger = samples(), Ledger(tmp_path)
    found = tune(target, "each", [method()], some, samples(prefix="h"), ledger, timed=0)
    assert found.best is not None and found.best.setting.knob == "10 computed"
    kept = {setting.key for setting in one.asked}
    assert len(kept) == 3 and not kept & {setting.key for setting in some[3].asked}


def test_lpips_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    setting, some = method().settings[3], samples(2)
    assert [one.lpips for one in Ledger(tmp_path).measure(setting, some)] == [None, None]
    measured = Ledger(tmp_path, perceptual=lambda first, second: 0.25).measure(setting, some)
    assert [one.lpips for one in measured] == [0.25, 0.25]
    assert point_of(setting, measured).lpips_worst == 0.25


def measured(psnr: float, passes: int) -> list[Measurement]:
    return [Measurement(psnr, 0.99, 0.01, passes, 20, 1.0, 2.0, 0.5, 1.0)]


def test_the_pareto_front_leaves_out_what_is_beaten(tmp_path: Path) -> None:
    figures = {"mild": (60, 16), "beaten": (45, 14), "middle": (50, 10), "harsh": (40, 5)}
    points = [point_of(Setting(name, ""), measured(*numbers)) for name, numbers in figures.items()]
    assert [point.setting.method for point in pareto(points)] == ["mild", "middle", "harsh"]
    lines = table(pareto(points)).splitlines()
    assert lines[2].split() == ["middle", "2.00x", "2.00x", "50.0", "50.0", *["0.9900"] * 2, *["0.0100"] * 2]
    assert plot_curve(tmp_path / "curve.png", points).stat().st_size > 1000


@pytest.mark.parametrize("steps", [5, 12, 28, 50])
@pytest.mark.parametrize("power", [1.0, 1.6])
def test_schedules_have_as_many_steps_as_they_say(steps: int, power: float) -> None:
    for computed in range(3, steps + 1):
        schedule = spread(steps, computed, power)
        assert len(schedule) == computed
        assert {0, 1, steps - 1} <= set(schedule) <= set(range(steps))


def test_every_sweep_grows_harsher_and_makes_settings_that_exist() -> None:
    calibration = {
        "residual": Calibration(
            coefficients=(1.0, 0.0), fitted_range=(0.1, 0.5), r2_fit=1, r2_held_out=1, points=9, held_out_points=9
        )
    }
    methods = all_methods(28, calibration)
    assert [one.name for one in methods if "distance" in one.name] == ["calibrated distance gate, residual"]
    assert len({setting.key for one in methods for setting in one.settings}) == sum(
        len(one.settings) for one in methods
    )
    assert [one.name for one in all_methods(3, calibration)] == [PLAIN]  # nothing between two first and the last step
    assert not any("residual" in one.name for one in all_methods(28, {}, knows_blocks=False))


def test_references_are_searched_alone_and_together_with_skipped_steps() -> None:
    methods = {one.name: one.settings for one in all_methods(8, {}, references="drift")}
    evenly = [one.reference_kv for one in methods["references refreshed evenly"]]
    assert [one.refresh for one in evenly if one is not None][-3:] == [(0, 2, 5), (0, 4), (0,)]
    tolerances = [
        one.reference_kv.drift_tolerance for one in methods["references refreshed by drift"] if one.reference_kv
    ]
    assert tolerances == sorted(tolerances) and len(set(tolerances)) > 10
    assert all(one.teacache is None for name in list(methods)[-6:-4] for one in methods[name])
    both = [one for name in list(methods)[-4:] for one in methods[name]]
    assert all(one.teacache is not None and one.reference_kv is not None for one in both)
    assert {one.teacache.gate for one in both if one.teacache} == {"error", "schedule"}
    kept = [one.key for settings in methods.values() for one in settings if one.reference_kv is not None]
    assert len(set(kept)) == len(kept)
    assert not any("references" in one.name for one in all_methods(8, {}))


def test_exact_references_are_kept_and_never_refreshed() -> None:
    methods = [one for one in all_methods(8, {}, references="exact") if "references" in one.name]
    assert {one.reference_kv for method in methods for one in method.settings} == {ReferenceKVConfig()}
    assert [len(method.settings) for method in methods][0] == 1
