"""What a report computes from its pictures, its verdict, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import datetime

import numpy as np
import pytest
from PIL import Image
from sample_report import compared_edit, pattern

from dittocache.quality.report_caches import CachesSection, ComparedEdit, Role, Variant
from dittocache.quality.report_data import (
    BeforeAfterSection,
    HeldOutEdit,
    Report,
    TrainingSpeed,
    TrainingSpeedSection,
)
from dittocache.quality.report_json import report_as_dict
from dittocache.quality.verdict import against_baseline, compose_verdict, fastest_cached, key_numbers

EMPTY = Report(title="t", date=datetime(2026, 1, 31))


def flat(level: int) -> Image.Image:
    return Image.fromarray(np.full((16, 16, 3), level, dtype=np.uint8))


def held_out(base: int, lora: int) -> HeldOutEdit:
    """An edit whose base and LoRA pictures are so many levels off the target."""
    return HeldOutEdit(f"{base}/{lora}", flat(0), flat(100 + base), flat(100 + lora), flat(100))


def variant(label: str, role: Role, level: int, seconds: float, marks: str = "CC") -> Variant:
    return Variant(label, role, flat(level), seconds, (pattern(marks),))


def test_gains_are_decibels_of_the_error_ratio_and_the_worst_is_the_farthest() -> None:
    section = BeforeAfterSection((held_out(100, 10), held_out(40, 20), held_out(10, 15)))
    gains = [20 * math.log10(ratio) for ratio in (10, 2, 10 / 15)]
    assert [edit.gain for edit in section.edits] == pytest.approx(gains)
    assert section.mean_gain == pytest.approx(sum(gains) / 3)
    assert (section.smallest_gain, section.largest_gain) == pytest.approx((gains[2], gains[0]))
    assert section.improved == 2
    assert section.worst is section.edits[1]


def test_a_perfect_edit_counts_as_the_cap_so_that_the_mean_stays_finite() -> None:
    section = BeforeAfterSection((held_out(10, 0), held_out(10, 10)))
    assert section.lora_psnr == pytest.approx((100 + 20 * math.log10(25.5)) / 2)


def test_summaries_are_over_all_edits_and_against_each_edits_own_uncached_picture() -> None:
    def edit(shift: int, off: int, seconds: float) -> ComparedEdit:
        return ComparedEdit(
            "e",
            flat(0),
            (
                variant("Plain", "uncached", 50 + shift, 4.0, "CCCC"),
                variant("Tea", "cached", 50 + shift + off, seconds, "CSSC"),
            ),
        )

    plain, tea = CachesSection((edit(0, 1, 1.0), edit(100, 10, 3.0))).summaries
    assert (plain.speedup, plain.worst_psnr, plain.mean_ssim) == (1.0, math.inf, 1.0)
    assert tea.seconds == 2.0 and tea.speedup == 2.0
    assert (tea.computed, tea.skipped) == (2.0, 2.0)
    assert tea.worst_psnr == pytest.approx(20 * math.log10(25.5))
    assert tea.mean_psnr == pytest.approx((20 * math.log10(255) + 20 * math.log10(25.5)) / 2)


def test_identical_pictures_are_infinitely_near_only_when_all_are() -> None:
    def tea(*levels: int) -> float:
        edits = [
            ComparedEdit("e", flat(0), (variant("P", "uncached", 50, 1), variant("T", "cached", 50 + level, 1)))
            for level in levels
        ]
        return CachesSection(tuple(edits)).summaries[1].mean_psnr

    assert tea(0, 0) == math.inf
    assert tea(0, 255 - 50) == pytest.approx((100 + 20 * math.log10(255 / 205)) / 2)


@pytest.mark.parametrize("roles", [(), ("uncached", "uncached"), ("cached",)])
def test_an_edit_needs_one_uncached_variant(roles: tuple[Role, ...]) -> None:
    with pytest.raises(ValueError, match="expected exactly one"):
        ComparedEdit("e", flat(0), tuple(variant("v", role, 1, 1.0) for role in roles))


def test_edits_that_were_made_in_different_ways_are_not_averaged() -> None:
    edit = compared_edit(1, "a")
    with pytest.raises(ValueError, match="'b' has the variants"):
        CachesSection((edit, dataclasses.replace(edit, caption="b", variants=edit.variants[:3])))


@pytest.mark.parametrize("section", [CachesSection, BeforeAfterSection])
def test_a_section_about_nothing_is_refused(section) -> None:
    with pytest.raises(ValueError, match="leave the section out"):
        section(())


def section_with(cached_off: int, cached_seconds: float) -> CachesSection:
    return CachesSection(
        (
            ComparedEdit(
                "e",
                flat(0),
                (
                    variant("Uncached", "uncached", 100, 4.0),
                    variant("TeaCache", "cached", 100 + cached_off, cached_seconds),
                    variant("10 plain steps", "fewer_steps", 110, 2.0),
                ),
            ),
        )
    )


def test_a_cache_beats_the_baseline_only_when_it_is_as_fast_and_nearer() -> None:
    assert against_baseline(section_with(1, 2.0)) == (
        "TeaCache takes no longer than 10 plain steps and is 20.0 dB closer to the uncached pictures."
    )
    assert against_baseline(section_with(1, 2.1)) == (
        "TeaCache takes 5% longer than 10 plain steps and is 20.0 dB closer to the uncached pictures: "
        "neither is better in both."
    )
    assert "the better bargain" in against_baseline(section_with(10, 1.0))
    assert against_baseline(CachesSection((dataclasses.replace(_without_baseline()),))) == ""


def _without_baseline() -> ComparedEdit:
    edit = section_with(1, 2.0).edits[0]
    return dataclasses.replace(edit, variants=edit.variants[:2])


def test_the_verdict_is_one_sentence_with_the_numbers_of_the_sections() -> None:
    report = dataclasses.replace(
        EMPTY,
        before_after=BeforeAfterSection((held_out(100, 10),)),
        training_speed=TrainingSpeedSection(TrainingSpeed("Live", 3.0, 5), TrainingSpeed("Cached", 1.0, 5)),
        caches=section_with(1, 2.0),
    )
    assert compose_verdict(report) == (
        "The LoRA raises PSNR to the target by 20.0 dB on 1 held-out edit, a training step on cached embeddings is "
        "3.00× as fast as live, and sampling with TeaCache is 2.00× as fast as uncached (48.1 dB PSNR against it)."
    )
    assert [number.value for number in key_numbers(report)] == ["+20.0 dB", "2.00×", "3.00×"]


def test_the_verdict_does_not_hide_a_loss() -> None:
    report = dataclasses.replace(EMPTY, before_after=BeforeAfterSection((held_out(10, 20),)))
    assert compose_verdict(report) == "The LoRA lowers PSNR to the target by 6.0 dB on 1 held-out edit."


def test_without_numbers_there_is_no_verdict() -> None:
    assert compose_verdict(EMPTY) == "" and key_numbers(EMPTY) == []
    only_plain = dataclasses.replace(_without_baseline(), variants=_without_baseline().variants[:1])
    assert fastest_cached(CachesSection((only_plain,))) is None
    assert CachesSection((only_plain,)).worst is None


def test_the_json_form_is_json_and_holds_the_computed_numbers(report: Report) -> None:
    values = json.loads(json.dumps(report_as_dict(report), allow_nan=False))
    assert report.before_after is not None and report.caches is not None
    assert values["date"] == "2026-01-31T14:05:00+00:00"
    assert values["before_after"]["mean_gain"] == pytest.approx(report.before_after.mean_gain)
    assert values["samples"]["pairs"][0]["target"] == {"width": 128, "height": 128}
    assert values["caches"]["edits"][0]["psnrs"][0] == 100.0  # infinite: capped
    assert values["caches"]["summaries"][1]["worst_psnr"] == pytest.approx(report.caches.summaries[1].worst_psnr)
    assert values["cached"]["encoded"] == 0 and values["cached"]["reused"] == 160
    assert values["training_speed"]["speedup"] == pytest.approx(0.412 / 0.187)
