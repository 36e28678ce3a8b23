"""Lays a `Report` out as one HTML file that needs nothing else: no network, no scripts, no other files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from dittocache.quality import units
from dittocache.quality.loss_curve import loss_svg, smoothed, smoothing_window
from dittocache.quality.metrics import PSNR_CAP
from dittocache.quality.pareto_curve import pareto_svg
from dittocache.quality.pictures import amplification, data_uri, difference_map
from dittocache.quality.report_caches import CachesSection, ComparedEdit
from dittocache.quality.report_data import BeforeAfterSection, HeldOutEdit, LossSection, Report
from dittocache.quality.report_tuning import TuningSection
from dittocache.quality.verdict import against_baseline, compose_verdict, key_numbers

SECTIONS = (
    ("samples", "Samples"),
    ("cached", "What was cached"),
    ("training_speed", "Cached against live training"),
    ("loss", "Loss curve"),
    ("before_after", "Before and after"),
    ("caches", "Caches compared"),
    ("tuning", "Speed beside quality"),
)
"""Field of `Report` and heading, in the order of the page; each has its template `section_FIELD.html.j2`."""


def write_report(report: Report, path: Path, largest_side: int = 768) -> Path:
    """Write the report and return its path; the folder is made when missing, and an older file is replaced at once.

    Args:
        largest_side: pixels to which larger pictures are reduced for the page. Numbers are computed at full size.

    Raises:
        DataError: pictures that are compared differ in size or are not 8-bit RGB.
    """
    html = render_report(report, largest_side)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(html)
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would keep a web server from showing it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def render_report(report: Report, largest_side: int = 768) -> str:
    """The page as a string; the same for the same report."""
    caches = _caches_view(report.caches) if report.caches else None
    values = {
        "report": report,
        "verdict": compose_verdict(report) if report.verdict is None else report.verdict,
        "numbers": key_numbers(report),
        "sections": [(name, title) for name, title in SECTIONS if getattr(report, name) is not None],
        "psnr_cap": PSNR_CAP,
        "loss": _loss_view(report.loss) if report.loss else None,
        "before_after": _before_after_view(report.before_after) if report.before_after else None,
        "caches": caches,
        "tuning": _tuning_view(report.tuning) if report.tuning else None,
        "against_uncached": _against_uncached,
        "difference": partial(difference_map, factor=caches.factor if caches else 1),
    }
    return _environment(largest_side).get_template("report.html.j2").render(values)


def _environment(largest_side: int) -> Environment:
    environment = Environment(
        loader=PackageLoader("dittocache.quality", "templates"),
        autoescape=True,  # for every file: captions and prompts are other people's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def png(image: Image.Image) -> Markup:
        return Markup(data_uri(image, largest_side))  # base64: nothing to escape

    environment.filters.update(
        {
            "png": png,
            "bytes": _unbroken(units.bytes_text),
            "seconds": _unbroken(units.seconds_text),
            "db": _unbroken(units.decibels_text),
            "gain": _unbroken(units.gain_text),
            "ratio": units.ratio_text,
            "similarity": units.similarity_text,
            "perceived": units.perceived_text,
            "count": units.count_text,
            "plural": units.plural,
            "date": _date_text,
        }
    )
    return environment


def _unbroken(text_of: Callable[[Any], str]) -> Callable[[Any], str]:
    """A number and its unit stay on one line."""
    return lambda value: text_of(value).replace(" ", "\N{NO-BREAK SPACE}")


def _against_uncached(edit: ComparedEdit, index: int) -> list[str]:
    """The lines below a picture that say how near it is to the uncached one."""
    if edit.variants[index].role == "uncached":
        return []
    return [
        units.decibels_text(edit.psnrs[index]),
        f"SSIM {units.similarity_text(edit.ssims[index])}",
        f"FLIP {units.perceived_text(edit.flips[index])}",
    ]


def _date_text(date: datetime) -> str:
    """`2026-01-31 14:05 UTC`; a date without a time zone is shown without one."""
    return date.strftime("%Y-%m-%d %H:%M %Z").strip()


@dataclass(frozen=True)
class _LossView:
    wide: Markup
    narrow: Markup
    window: int
    description: str


def _loss_view(section: LossSection) -> _LossView:
    """Two drawings, for wide pages and for phones: one scaled to both would be unreadable on one."""
    window = smoothing_window(len(section.losses))
    line = smoothed(section.losses, window)
    first, last = float(line[0]), float(line[-1])
    description = (
        f"Over {units.plural(len(section.losses), 'step')} the mean loss went from "
        f"{_loss_text(first)} to {_loss_text(last)}."
    )
    return _LossView(
        wide=loss_svg(section.steps, section.losses, 960, 340),
        narrow=loss_svg(section.steps, section.losses, 370, 270),
        window=window,
        description=description,
    )


def _loss_text(loss: float) -> str:
    return units.three_digits(loss) if math.isfinite(loss) else "not a number"


@dataclass(frozen=True)
class _TuningView:
    wide: Markup
    narrow: Markup
    description: str


def _tuning_view(section: TuningSection) -> _TuningView:
    """Two drawings, as of the loss."""
    fastest = section.front[-1]
    description = (
        f"Of {units.plural(len(section.points), 'setting')} nothing beats {len(section.front)}; the fastest of them, "
        f"{fastest.label}, has {units.ratio_text(fastest.speedup)} at {units.decibels_text(fastest.psnr)}."
    )
    return _TuningView(pareto_svg(section, 960, 360), pareto_svg(section, 370, 300), description)


@dataclass(frozen=True)
class _BeforeAfterView:
    shown: list[HeldOutEdit]
    others: list[HeldOutEdit]


def _before_after_view(section: BeforeAfterSection) -> _BeforeAfterView:
    """The first edits and the worst one in sight, the others folded away."""
    shown = list(section.edits[: section.shown])
    worst = section.worst
    if not any(edit is worst for edit in shown):
        shown.append(worst)
    others = [edit for edit in section.edits if not any(edit is one for one in shown)]
    return _BeforeAfterView(shown, others)


@dataclass(frozen=True)
class _CachesView:
    factor: int
    longest: int
    against_baseline: str


def _caches_view(section: CachesSection) -> _CachesView:
    """One amplification for all difference maps, the longest row of steps, and how the baseline fares.

    The amplification is chosen by the cached pictures, which matter; the baseline's map may clip.
    """
    pairs = [
        (variant.picture, edit.uncached.picture)
        for edit in section.edits
        for variant in edit.variants
        if variant.role == "cached"
    ]
    patterns = [pattern for variant in section.edits[0].variants for pattern in variant.patterns]
    return _CachesView(
        amplification(pairs), max((len(pattern.marks) for pattern in patterns), default=0), against_baseline(section)
    )
