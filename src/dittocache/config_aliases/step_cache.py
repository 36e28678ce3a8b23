"""The configuration guide's words for the step cache, and LightX2V's, as the `teacache` section.

cache_adapter: tea_cache                    teacache: {rel_l1_thresh: 0.2}
cache_config: {rel_l1_thresh: 0.2}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dittocache.config_aliases.nested import put
from dittocache.errors import StepCacheError
from dittocache.sampling.cache_keys import (
    ADAPTER_VARIABLE,
    GUIDE_KEYS,
    LIGHTX2V_KEYS,
    NO_CACHE,
    TEA_CACHE,
    in_guides_words,
)

SECTION = "teacache"
CLASS_NAME = "model_class_name"
_NAMES = (*GUIDE_KEYS, *LIGHTX2V_KEYS)


def with_named_cache(content: Mapping[str, Any], overrides: Mapping[str, Any], named: str | None) -> dict[str, Any]:
    """`overrides` with the cache that the environment names, where neither they nor `content` say anything of one.

    A section that is `null`, as saved configs have it, says nothing; `cache_adapter: none` does.
    """
    said = any(name in content or name in overrides for name in _NAMES) or content.get(SECTION) is not None
    said = said or any(name.partition(".")[0] == SECTION for name in overrides)
    return dict(overrides) if said or not named else {**overrides, "cache_adapter": named}


def twice_said(settings: Mapping[str, Any]) -> list[str]:
    """A problem where one and the same source, by dotted names, gives the section and `cache_config` too."""
    sections = [name for name, value in settings.items() if name.partition(".")[0] == SECTION and value is not None]
    if not sections or settings.get("cache_config") is None:
        return []
    return [f"cache_config and {sections[0]} are both given; they mean the same: keep one"]


def apply_step_cache(settings: dict[str, Any], problems: list[str]) -> None:
    """Take the guide's and LightX2V's keys out of `settings`; `cache_config` takes the place of the section.

    `cache_config` alone turns the cache on, `cache_adapter: none` off. `model_class_name` becomes the model type, and
    the family where it tells one. `infer_steps` is the number of steps of a picture.
    """
    found = {name: settings.pop(name) for name in _NAMES if name in settings}
    class_name = settings.pop(CLASS_NAME, None)
    if found.get("infer_steps") is not None:
        put(settings, "generate.num_inference_steps", found.pop("infer_steps"), "infer_steps", problems)
    try:
        found = in_guides_words(found)
    except ValueError as error:
        problems.append(str(error))
        return
    adapter = found.get("cache_adapter") or (NO_CACHE if "cache_adapter" in found else None)  # YAML reads none as null
    _choose(settings, adapter, found.get("cache_config"), problems)
    section = settings.get(SECTION)
    types = {CLASS_NAME: class_name} if class_name is not None else {}
    if isinstance(section, dict):
        if class_name is not None and section.setdefault("model_type", class_name) != class_name:
            problems.append(
                f"cache_config.model_type is {section['model_type']!r} and {CLASS_NAME} is {class_name!r}; they must "
                "be the same: leave model_type out"
            )
        elif section.get("model_type") is not None:
            types = {f"{SECTION}.model_type": section["model_type"]}
    for name, model_type in types.items():
        _check_model_type(name, model_type, problems)
    if class_name is not None:
        _name_family(settings, class_name, problems)


def _choose(settings: dict[str, Any], adapter: Any, cache_config: Any, problems: list[str]) -> None:
    if adapter not in (None, NO_CACHE, TEA_CACHE):
        problems.append(f"cache_adapter (or {ADAPTER_VARIABLE}): found {adapter!r}; expected {NO_CACHE} or {TEA_CACHE}")
    elif adapter == NO_CACHE:
        settings[SECTION] = None
    elif isinstance(cache_config, Mapping):
        settings[SECTION] = dict(cache_config)
    elif cache_config is not None:
        problems.append(
            f'cache_config: found {cache_config!r}; expected settings of the cache, such as {{"rel_l1_thresh": 0.2}}'
        )
    elif adapter == TEA_CACHE and settings.get(SECTION) is None:
        settings[SECTION] = {}


def _name_family(settings: dict[str, Any], class_name: Any, problems: list[str]) -> None:
    from dittocache.families.registry import FAMILIES

    names = [name for name, family in FAMILIES.items() if family.pipeline_class_name == class_name]
    if len(names) == 1:
        put(settings, "model.family", names[0], CLASS_NAME, problems)


def _check_model_type(name: str, model_type: Any, problems: list[str]) -> None:
    from dittocache.teacache.extractors import get_extractor

    try:
        get_extractor(str(model_type))
    except StepCacheError as error:
        problems.append(f"{name}: {error}")
