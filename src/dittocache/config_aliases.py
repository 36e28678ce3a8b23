"""Other spellings of settings that configs of the embedding cache's specification use.

data.init_args.cache_dir, data.init_args.use_cache             cache.cache_dir, cache.use_cache
data.init_args.dataset_path, data.init_args.caption_dropout_rate   data.path, data.caption_dropout
cache.vae_encoder_device, cache.text_encoder_device            cache.devices.vae, cache.devices.text_encoder
cache.prompt_empty_drop_keys                                   checked: prompt dropout always replaces both
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALIASES: Mapping[str, str] = {
    "data.init_args.cache_dir": "cache.cache_dir",
    "data.init_args.use_cache": "cache.use_cache",
    "data.init_args.dataset_path": "data.path",
    "data.init_args.caption_dropout_rate": "data.caption_dropout",
    "cache.vae_encoder_device": "cache.devices.vae",
    "cache.text_encoder_device": "cache.devices.text_encoder",
}

EMPTY_PROMPT_ARTIFACTS = frozenset({"empty_prompt_embeds", "empty_prompt_embeds_mask"})


def resolve_aliases(settings: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """A copy of `settings` (nested) with every alias under its own name.

    A setting given under both names with different values is added to `problems`.
    """
    resolved = _copied(settings)
    for alias, name in ALIASES.items():
        missing = object()
        value = _taken(resolved, alias, missing)
        if value is missing:
            continue
        section, last = _section_of(resolved, name)
        if section is None:
            problems.append(f"{alias}: {name} cannot be set, because {name.rpartition('.')[0]} holds no settings")
        elif last in section and section[last] != value:
            problems.append(f"{alias} is {value!r} but {name} is {section[last]!r}; they mean the same: keep one")
        else:
            section[last] = value
    init_args = resolved["data"].get("init_args") if isinstance(resolved.get("data"), dict) else None
    if init_args == {}:
        del resolved["data"]["init_args"]
    _check_drop_keys(resolved, problems)
    return resolved


def _check_drop_keys(settings: dict[str, Any], problems: list[str]) -> None:
    keys = _taken(settings, "cache.prompt_empty_drop_keys", None)
    if keys is None:
        return
    expected = ", ".join(sorted(EMPTY_PROMPT_ARTIFACTS))
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        problems.append(f"cache.prompt_empty_drop_keys: found {keys!r}; expected a list of {expected}")
    elif set(keys) != EMPTY_PROMPT_ARTIFACTS:
        problems.append(
            f"cache.prompt_empty_drop_keys: found {', '.join(keys)}; expected {expected}: they are replaced together"
        )


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in settings.items()}


def _taken(settings: dict[str, Any], name: str, default: Any) -> Any:
    """The value of a dotted name, removed from `settings`; `default` where it is not there."""
    *sections, last = name.split(".")
    level: Any = settings
    for section in sections:
        level = level.get(section) if isinstance(level, dict) else None
    return level.pop(last, default) if isinstance(level, dict) else default


def _section_of(settings: dict[str, Any], name: str) -> tuple[dict[str, Any] | None, str]:
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
