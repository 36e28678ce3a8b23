"""The page's picture of a tuning, and comparisons of models that take no picture."""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime

import pytest
from report_page import Page
from sample_report import compared_edit, sample_report, tuning_section

from dittocache.quality.pareto_curve import pareto_svg
from dittocache.quality.report import render_report
from dittocache.quality.report_caches import CachesSection
from dittocache.quality.report_data import Report
from dittocache.quality.report_tuning import TuningPoint, TuningSection

EMPTY = Report(title="t", date=datetime(2026, 1, 31))


def point(label: str, speedup: float, psnr: float, plain: bool = False, chosen: bool = False) -> TuningPoint:
    return TuningPoint(label, speedup, speedup, psnr, psnr, 1.0, 1.0, 0.0, 0.0, plain, chosen)


def test_the_front_is_what_nothing_beats_and_all_points_are_drawn() -> None:
    section = TuningSection((point("a", 1.5, 60), point("beaten", 1.4, 50), point("plain", 2.0, 55, plain=True)))
    assert [one.label for one in section.front] == ["a", "plain"]
    svg = pareto_svg(section, 900, 300)
    assert (svg.count('class="cache"'), svg.count('class="plain"'), svg.count('class="chosen"')) == (2, 1, 0)
    assert "<title>a: 1.50×, 60.0 dB</title>" in svg
    [line] = re.findall(r'class="front" points="([^"]*)"', svg)
    [(left, top), (right, bottom)] = [tuple(map(float, one.split(","))) for one in line.split()]
    assert left < right and top < bottom, "faster is to the right, closer is above"


def test_settings_that_change_nothing_do_not_press_the_others_together() -> None:
    section = TuningSection((point("nothing skipped", 1.0, 100.0), point("a", 1.5, 60), point("b", 2, 50)))
    assert "nothing skipped" not in pareto_svg(section, 900, 300)
    alone = TuningSection((point("nothing skipped", 1.0, 100.0),))
    assert "nothing skipped" in pareto_svg(alone, 900, 300)


def test_the_recommended_setting_is_ringed_and_labels_are_escaped() -> None:
    page = render_report(dataclasses.replace(EMPTY, tuning=TuningSection((point("<b>x</b>", 2.0, 50, chosen=True),))))
    assert "<b>x</b>" not in page
    assert page.count('<circle class="chosen"') == 2, "once in each of the two drawings"
    assert "recommended" in Page(page).text


def test_a_tuning_without_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="leave the section out"):
        TuningSection(())


def test_the_table_has_what_nothing_beats() -> None:
    page = render_report(dataclasses.replace(EMPTY, tuning=tuning_section()))
    front = [one.label for one in tuning_section().front]
    assert re.findall(r'<th scope="row">(.*?)<', page) == front
    assert f"nothing beats {len(front)}" in page


def test_text_to_image_is_compared_and_shown_without_a_source() -> None:
    edit = dataclasses.replace(compared_edit(1, "a lighthouse"), source=None)
    report = sample_report()
    assert report.before_after is not None
    edits = tuple(dataclasses.replace(one, source=None) for one in report.before_after.edits)
    before_after = dataclasses.replace(report.before_after, edits=edits)
    page = Page(render_report(dataclasses.replace(EMPTY, caches=CachesSection((edit,)), before_after=before_after)))
    assert not [element for element in page.all("img") if "Source" in element.attributes["alt"]]
    assert "a lighthouse" in page.text


def test_a_remark_of_a_cache_stands_on_the_page_once() -> None:
    edits = []
    for caption in ("one", "two"):
        edit = compared_edit(1, caption)
        variants = list(edit.variants)
        variants[1] = dataclasses.replace(variants[1], notes=("TeaCache skipped none of 28 calls",))
        edits.append(dataclasses.replace(edit, variants=tuple(variants)))
    page = Page(render_report(dataclasses.replace(EMPTY, caches=CachesSection(tuple(edits)))))
    assert page.text.count("TeaCache: TeaCache skipped none of 28 calls") == 1
