"""A picture made without and with the caches: both beside each other, what it took, what changed, what was skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nicegui import ui

from dittocache.quality.metrics import PSNR_CAP
from dittocache.quality.units import bytes_text, decibels_text, ratio_text, seconds_text, similarity_text
from dittocache.studio.shown import shown
from dittocache.studio.thumbnails import picture_url

MARKS = {
    "computed": "computed",
    "refreshed": "computed, references too",
    "kept": "computed, references kept",
    "skipped": "skipped",
}
"""What a step of a pattern did, in the user's words."""


def comparison(run_dir: Path, row: Mapping[str, Any]) -> None:
    """Show one row of a `compared` result: its source and every variant that was made."""
    variants: Sequence[Mapping[str, Any]] = row["variants"]
    plain = next((one for one in variants if one["role"] == "uncached"), None)
    with ui.element("div").classes("comparison"):
        if row.get("source"):
            with ui.element("figure"):
                _picture(Path(row["source"]), "the picture that was given")
                ui.label("Given").classes("figure-title")
        for variant in variants:
            _figure(run_dir, variant, plain)
    if any(variant["role"] == "cached" for variant in variants):
        _legend()


def _figure(run_dir: Path, variant: Mapping[str, Any], plain: Mapping[str, Any] | None) -> None:
    with ui.element("figure"):
        _picture(run_dir / variant["picture"], variant["label"])
        ui.label(shown(variant["label"])).classes("figure-title")
        for words in _facts(variant, plain):
            ui.label(words).classes("small")
        if variant["role"] == "cached":
            for branch, marks in variant["patterns"].items():
                _strip(branch, marks, several=len(variant["patterns"]) > 1)
        for note in variant["notes"]:
            ui.label(shown(note, 1000)).classes("note small")


def _facts(variant: Mapping[str, Any], plain: Mapping[str, Any] | None) -> list[str]:
    """Time, distance to the uncached picture and memory, in words."""
    seconds = float(variant["seconds"])
    words = [seconds_text(seconds)]
    if plain is not None and variant is not plain and seconds:
        words[0] += f", {ratio_text(float(plain['seconds']) / seconds)} as fast"
    if "psnr" in variant:
        decibels = float(variant["psnr"])
        same = decibels >= PSNR_CAP
        likeness = "identical to it" if same else f"PSNR {decibels_text(decibels)}"
        if "ssim" in variant and not same:
            likeness += f", SSIM {similarity_text(float(variant['ssim']))}"
        words.append(f"Beside the uncached one: {likeness}")
    if variant.get("settings"):
        words.append(shown(variant["settings"]))
    if variant.get("bytes_held"):
        words.append(f"The caches held {bytes_text(round(variant['bytes_held']))}")
    return words


def _strip(branch: str, marks: Sequence[str], several: bool) -> None:
    """One box a step; told in words for those who see no colours."""
    skipped = sum(mark == "skipped" for mark in marks)
    words = f"{len(marks)} steps, {skipped} skipped"
    ui.label(f"{shown(branch)}: {words}" if several else words).classes("small muted")
    strip = ui.element("div").classes("strip").props("role=img")
    strip.props["aria-label"] = f"{words}: " + ", ".join(
        f"step {number} {MARKS.get(mark, mark)}" for number, mark in enumerate(marks, start=1)
    )
    with strip:
        for mark in marks:
            ui.element("span").classes(f"mark {mark if mark in MARKS else ''}")


def _legend() -> None:
    with ui.element("div").classes("line legend small muted"):
        for mark, words in MARKS.items():
            with ui.element("div").classes("line nowrap"):
                ui.element("span").classes(f"mark {mark}")
                ui.label(words)


def _picture(path: Path, alt: str) -> None:
    link = ui.element("a")
    link.props["href"] = picture_url(path)
    link.props["target"] = "_blank"
    with link:
        picture = ui.element("img")
        picture.props["src"] = picture_url(path)
        picture.props["alt"] = shown(alt)
