"""Dotted names in nested settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same mappings anew, to be changed without harm."""
    return {key: copied(value) if isinstance(value, Mapping) else value for key, value in settings.items()}


def taken(settings: dict[str, Any], name: str, default: Any) -> Any:
    """The value of a dotted name, removed from `settings`; `default` where it is not there."""
    *sections, last = name.split(".")
    level: Any = settings
    for section in sections:
        level = level.get(section) if isinstance(level, dict) else None
    return level.pop(last, default) if isinstance(level, dict) else default


def section_of(settings: dict[str, Any], name: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that holds a dotted name, made where it is missing, and the name's last part."""
    *sections, last = name.split(".")
    level = settings
    for section in sections:
        inner = level.get(section)
        if inner is None:
            inner = level[section] = {}
        if not isinstance(inner, dict):
            return None, last
        level = inner
    return level, last


def put(settings: dict[str, Any], name: str, value: Any, said_as: str, problems: list[str]) -> None:
    """Set a dotted name; where it is set to something else already, say so in the words of `said_as`."""
    section, last = section_of(settings, name)
    if section is None:
        problems.append(f"{said_as}: {name} cannot be set, because {name.rpartition('.')[0]} holds no settings")
    elif last in section and section[last] != value:
        problems.append(f"{said_as} is {value!r} but {name} is {section[last]!r}; they mean the same: keep one")
    else:
        section[last] = value
