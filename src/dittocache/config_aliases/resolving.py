"""From the names and values of the specification's configs to those of this package."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from dittocache.config_aliases.job_files import apply_job_file
from dittocache.config_aliases.names import ALIASES, NULL_SAYS_NOTHING, SECTIONS, VALUES
from dittocache.config_aliases.nested import copied, put, taken
from dittocache.config_aliases.references import resolve_references
from dittocache.config_aliases.rules import ONLY, apply_rules


def resolve_aliases(settings: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """A copy of `settings` (nested) with every alias under its own name.

    A setting given under both names with different values, one that cannot be had, and a reference that leads nowhere
    are added to `problems`.
    """
    resolved = resolve_references(copied(settings), problems)
    apply_job_file(resolved, problems)
    apply_rules(resolved, problems)
    for alias, name in ALIASES.items():
        missing = object()
        value = taken(resolved, alias, missing)
        says_nothing = value is None and alias in NULL_SAYS_NOTHING
        if value is missing or says_nothing or (alias == "optimizer.init_args" and value == {}):
            continue
        put(resolved, name, _renamed(alias, value), alias, problems)
    for name in [name for name in resolved if name.startswith("caching_")]:
        problems.append(_unknown(name))
        del resolved[name]
    for name in SECTIONS:
        problems += [_unknown(f"{name}.{setting}") for setting in _leaves(taken(resolved, name, {}))]
    return resolved


def _leaves(section: Any) -> list[str]:
    """Dotted names of what is left of a section."""
    if not isinstance(section, Mapping):
        return []
    return [
        f"{name}.{inner}" if inner else str(name) for name, value in section.items() for inner in _leaves(value) or [""]
    ]


def _unknown(name: str) -> str:
    known = [*ALIASES, *ONLY]
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    near += [alias for alias in known if alias.rpartition(".")[2] == last]
    return f"{name}: there is no such setting{f'; did you mean {near[0]}?' if near else ''}"


def _renamed(alias: str, value: Any) -> Any:
    for other, ours in VALUES.get(alias, {}).items():
        if value == other:
            return ours
    return value
