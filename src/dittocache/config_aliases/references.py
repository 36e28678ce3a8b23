"""`${section.setting}` in a config: the value that is written there, as OmegaConf reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def resolve_references(settings: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """A copy of nested settings with every reference replaced; one that leads nowhere is added to `problems`."""

    def value_of(value: Any, name: str, seen: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: value_of(inner, f"{name}.{key}" if name else str(key), seen) for key, inner in value.items()}
        if isinstance(value, list):
            return [value_of(inner, name, seen) for inner in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole is not None:
            return looked_up(whole[1], name, seen)
        return _REFERENCE.sub(lambda found: str(looked_up(found[1], name, seen)), value)

    def looked_up(target: str, name: str, seen: tuple[str, ...]) -> Any:
        level: Any = settings
        for part in target.split("."):
            level = level.get(part, _NOTHING) if isinstance(level, Mapping) else _NOTHING
        if level is _NOTHING or target in seen or isinstance(level, Mapping):
            why = "leads back to itself" if target in seen else "names no setting of this file"
            problems.append(f"{name}: ${{{target}}} {why}; write the value")
            return None
        return value_of(level, name, (*seen, target))

    resolved: dict[str, Any] = value_of(settings, "", ())
    return resolved


_NOTHING = object()
