"""A report as JSON values, for tools and for comparing runs."""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime
from functools import cached_property
from typing import Any

from PIL import Image

from dittocache.quality.metrics import capped
from dittocache.quality.report_data import Report

_COMPUTED = (
    "records",
    "encoded",
    "reused",
    "stored_bytes",
    "base_psnr",
    "lora_psnr",
    "gain",
    "mean_gain",
    "smallest_gain",
    "largest_gain",
    "improved",
    "computed",
    "skipped",
    "psnrs",
    "ssims",
    "flips",
    "summaries",
    "speedup",
)
"""The properties that hold numbers; the others (`worst`, `uncached`) repeat what the fields already say."""


def report_as_dict(report: Report) -> dict[str, Any]:
    """The report as JSON values, the numbers computed from its pictures included.

    A picture becomes its width and height, a date its ISO form, not-a-number null, and an infinite PSNR (identical
    pictures) the cap of `metrics.PSNR_CAP`.
    """
    values: dict[str, Any] = _json_value(report)
    return values


def _json_value(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return {"width": value.width, "height": value.height}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float):
        return None if math.isnan(value) else capped(value)
    if isinstance(value, tuple):
        return [_json_value(entry) for entry in value]
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        return {name: _json_value(getattr(value, name)) for name in [*fields, *_computed_names(type(value), fields)]}
    return value


def _computed_names(kind: type, fields: list[str]) -> list[str]:
    properties = [name for name, member in vars(kind).items() if isinstance(member, property | cached_property)]
    return [name for name in properties if name in _COMPUTED and name not in fields]
