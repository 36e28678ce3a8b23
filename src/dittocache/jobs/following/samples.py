"""The pictures that a `result` event tells of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dittocache.events import Event, number_in
from dittocache.jobs.following.view import SampleView


def samples_of(event: Event) -> Iterator[SampleView]:
    """Yield the pictures of a training's validation, of the edits made, and of the caches compared."""
    validation = event.get("validation")
    if isinstance(validation, Mapping):
        step = number_in(validation, "step")
        for row in _rows(validation, "pictures"):
            yield from _sample(row, row, "picture", step=None if step is None else int(step))
    for row in _rows(event, "edits"):
        for kind in ("base", "lora"):
            yield from _sample(row, row, kind, label=kind)
    for row in _rows(event, "compared"):
        for variant in _rows(row, "variants"):
            yield from _sample(
                row, variant, "picture", label=_text(variant, "label"), seconds=number_in(variant, "seconds")
            )


def _sample(edit: Mapping[str, Any], row: Mapping[str, Any], field: str, **more: Any) -> Iterator[SampleView]:
    """The picture that `row` has in `field`, where it has one."""
    if picture := _text(row, field):
        yield SampleView(picture, _text(edit, "caption"), _text(edit, "source"), _text(edit, "target"), **more)


def _rows(event: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows = event.get(name)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""
