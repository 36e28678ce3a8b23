"""The page holds everything it was given, nothing else, and asks nobody for anything."""

from __future__ import annotations

import dataclasses
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_page import Page
from sample_report import compared_edit, drawn, sample_report

from dittocache.errors import DataError
from dittocache.quality.report import SECTIONS, render_report, write_report
from dittocache.quality.report_caches import CachesSection
from dittocache.quality.report_data import (
    BeforeAfterSection,
    CachedArtifact,
    CachedSection,
    HeldOutEdit,
    LossSection,
    Report,
    SamplePair,
    SamplesSection,
)

NAMES = [name for name, _ in SECTIONS]
EMPTY = Report(title="Only a title", date=datetime(2026, 1, 31))


@pytest.fixture(scope="session")
def page(report: Report) -> Page:
    return Page(render_report(report))


def headings(page: Page) -> list[str]:
    return [element.attributes["id"] for element in page.all("section")]


def test_every_section_is_on_the_page_with_its_numbers(page: Page) -> None:
    assert headings(page) == NAMES
    for expected in [
        "dittocache demo --output runs/demo",
        "Example CPU 7000 @ 2.6 GHz, 2 cores, 8.00 GiB memory",
        "torch 2.13.0",
        "2026-01-31 14:05 UTC",
        "8 of 40 training samples. The left",
        "prompt_embeds_mask",
        "7.12 MiB",
        "412 ms",
        "2.20×",
        "Over 240 steps the mean loss",
        "Optimizer step",
        "12 of 12 came nearer",
        "11 plain steps",
        "rel_l1_thresh 0.2",
        "10 computed, 18 skipped: refreshed, kept, skipped",
        "FLIP 0.0",
        "psnr>=50 is kept by error 3.00",
        "Worst case",
        "Wall times are of one request each",
    ]:
        assert expected in page.text, expected


@pytest.mark.parametrize("missing", NAMES)
def test_a_section_that_is_left_out_is_left_out_alone(report: Report, missing: str) -> None:
    page = Page(render_report(dataclasses.replace(report, **{missing: None})))
    assert headings(page) == [name for name in NAMES if name != missing]
    assert f"#{missing}" not in [element.attributes["href"] for element in page.all("a")]


@pytest.mark.parametrize("name", NAMES)
def test_each_section_stands_on_its_own(report: Report, name: str) -> None:
    assert headings(Page(render_report(dataclasses.replace(EMPTY, **{name: getattr(report, name)})))) == [name]


def test_a_report_without_sections_is_still_a_page() -> None:
    page = Page(render_report(EMPTY))
    assert "Only a title" in page.text and "2026-01-31 00:00" in page.text
    assert headings(page) == [] and page.all("nav") == []


def test_nothing_is_fetched_from_outside(report: Report) -> None:
    html = render_report(report)
    page = Page(html)
    fetching = {"src", "href", "srcset", "data", "poster", "action", "xlink:href", "background"}
    targets = [v for element in page.elements for name, v in element.attributes.items() if name in fetching]
    assert len(targets) > 60
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in targets)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {element.tag for element in page.elements}
    without_pictures = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", html)
    assert not re.search(r"https?:|//\w|@import|url\(", without_pictures)
    policy = next(e for e in page.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none'")


def poisoned(value: Any, payload: str) -> Any:
    """The same report with every text replaced, and every label still equal to its equals."""
    if isinstance(value, str):
        return payload
    if isinstance(value, tuple):
        return tuple(poisoned(entry, payload) for entry in value)
    if dataclasses.is_dataclass(value):
        kept = {"role", "marks"}  # words of a closed list, not text
        changed = {
            f.name: poisoned(getattr(value, f.name), payload) for f in dataclasses.fields(value) if f.name not in kept
        }
        return dataclasses.replace(value, **changed)
    return value


@pytest.mark.parametrize(
    "payload", ["<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "</style><b>&amp;"]
)
def test_other_peoples_words_stay_words_in_text_and_in_attributes(report: Report, payload: str) -> None:
    clean, page = Page(render_report(report)), Page(render_report(poisoned(report, payload)))
    assert page.all("script") == []
    assert not any(name.startswith("on") for element in page.elements for name in element.attributes)
    assert len(page.all("img")) == len(clean.all("img"))
    assert payload in page.text
    assert any(payload in element.attributes["alt"] for element in page.all("img"))


def test_a_script_in_a_caption_is_escaped() -> None:
    pair = SamplePair("<script>alert('x')</script>", drawn(1), drawn(2))
    html = render_report(dataclasses.replace(EMPTY, samples=SamplesSection((pair,))))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_the_same_report_is_the_same_page() -> None:
    assert render_report(sample_report()) == render_report(sample_report())


def test_every_picture_is_described_and_every_scrolling_table_can_be_reached_by_keyboard(page: Page) -> None:
    assert all(element.attributes.get("alt") for element in page.all("img"))
    regions = [element for element in page.elements if element.attributes.get("role") == "region"]
    assert len(regions) == len(page.all("table")) == 4
    assert all(element.attributes["tabindex"] == "0" and element.attributes["aria-label"] for element in regions)
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    assert {element.attributes["href"][1:] for element in page.all("a")} <= set(ids)
    assert page.all("html")[0].attributes["lang"] == "en"
    assert len(page.all("h1")) == 1


def test_skip_patterns_are_told_by_letter_and_not_by_colour_alone(page: Page, report: Report) -> None:
    cells = re.findall(r'<li class="cell (\w+)" title="step \d+: (\w+)">(\w)</li>', page.html)
    assert report.caches is not None
    marks = [mark for variant in report.caches.edits[0].variants for p in variant.patterns for mark in p.marks]
    assert cells == [
        (mark, mark, {"computed": "C", "refreshed": "R", "kept": "K", "skipped": "S"}[mark]) for mark in marks
    ]


def test_branches_have_rows_of_their_own(report: Report) -> None:
    assert report.caches is not None
    edit = report.caches.edits[0]
    both = tuple(
        dataclasses.replace(v, patterns=tuple(dataclasses.replace(v.patterns[0], branch=b) for b in ("cond", "uncond")))
        for v in edit.variants
    )
    one, two = (
        render_report(dataclasses.replace(EMPTY, caches=CachesSection((dataclasses.replace(edit, variants=variants),))))
        for variants in (edit.variants, both)
    )
    assert one.count("<small>cond</small>") == 0
    assert two.count("<small>cond</small>") == two.count("<small>uncond</small>") == len(edit.variants)


def test_nothing_was_encoded_again_is_said_only_when_it_is_true() -> None:
    def text(encoded: int, reused: int) -> str:
        section = CachedSection((CachedArtifact("image_latents", "vae", encoded, reused, 2048, 1.5),), 2.0)
        return Page(render_report(dataclasses.replace(EMPTY, cached=section))).text

    assert "Nothing was encoded again. All 40 records" in text(0, 40)
    assert "Nothing was encoded again" not in text(1, 39)
    assert "1 record encoded in this run, 39 reused" in text(1, 39)
    assert "Nothing was encoded again" not in text(0, 0)


def test_the_worst_held_out_edit_is_in_sight_wherever_it_stands(report: Report) -> None:
    assert report.before_after is not None
    good = HeldOutEdit("good", drawn(1), drawn(1), drawn(1, frame=True), drawn(1, frame=True))
    bad = HeldOutEdit("the bad one", drawn(2), drawn(2), drawn(3), drawn(2, frame=True))
    for place in range(4):
        edits = [good, good, good]
        edits.insert(place, bad)
        section = dataclasses.replace(report.before_after, edits=tuple(edits), shown=1)
        page = Page(render_report(dataclasses.replace(EMPTY, before_after=section)))
        shown = [e for e in page.all("img") if e.attributes["alt"] == "With LoRA: the bad one"]
        assert len(shown) == 1 and "details" not in shown[0].inside
        assert page.text.count("Worst case") == 1


def test_the_worst_cached_picture_is_in_sight_though_its_edit_is_folded(report: Report) -> None:
    assert report.caches is not None
    edits = list(report.caches.edits)
    spoilt = list(edits[2].variants)
    spoilt[1] = dataclasses.replace(spoilt[1], picture=drawn(99))
    edits[2] = dataclasses.replace(edits[2], variants=tuple(spoilt))
    page = Page(render_report(dataclasses.replace(EMPTY, caches=CachesSection(tuple(edits)))))
    assert "Worst case TeaCache on “Put a dark frame around picture 62”" in page.text
    shown = [e for e in page.all("img") if e.attributes["alt"] == "Worst cached picture"]
    assert len(shown) == 1 and "details" not in shown[0].inside


def test_a_single_diverged_loss_does_not_break_the_page() -> None:
    section = LossSection((1, 2, 3), (0.5, float("nan"), float("inf")))
    assert "Loss curve" in Page(render_report(dataclasses.replace(EMPTY, loss=section))).text


def test_large_pictures_are_made_smaller_for_the_page_but_measured_at_full_size() -> None:
    source, target = drawn(1, side=300), drawn(1, frame=True, side=300)
    section = BeforeAfterSection((HeldOutEdit("large", source, source, drawn(2, side=300), target),))
    report = dataclasses.replace(EMPTY, before_after=section)
    small, full = render_report(report, largest_side=32), render_report(report, largest_side=300)
    assert len(small) < len(full)
    assert Page(small).text == Page(full).text


def test_writing_makes_the_folder_and_replaces_an_older_report(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "demo" / "report.html"
    assert write_report(EMPTY, path) == path
    write_report(dataclasses.replace(EMPTY, title="Newer"), path)
    assert "Newer" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_keeps_the_older_report_and_leaves_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(EMPTY, tmp_path / "report.html")
    before = path.read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(dataclasses.replace(EMPTY, title="Newer"), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_pictures_of_different_sizes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    edit = compared_edit(1, "wrong size")
    variants = list(edit.variants)
    variants[1] = dataclasses.replace(variants[1], picture=Image.new("RGB", (64, 64)))
    section = CachesSection((dataclasses.replace(edit, variants=tuple(variants)),))
    with pytest.raises(DataError, match="different sizes"):
        write_report(dataclasses.replace(EMPTY, caches=section), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
