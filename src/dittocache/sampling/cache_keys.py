"""How others write down a step cache: the configuration guide's `cache_adapter` and `cache_config`, LightX2V's keys.

LightX2V's keys (https://github.com/ModelTC/LightX2V) become the guide's, so that one reader serves files, the command
line and Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADAPTER_VARIABLE = "DIFFUSION_CACHE_ADAPTER"
"""Environment variable that names the cache where the configuration does not."""

TEA_CACHE = "tea_cache"
NO_CACHE = "none"

_FEATURE_CACHING = {"tea": TEA_CACHE, "nocaching": NO_CACHE, "none": NO_CACHE}
_CACHE_SETTINGS = ("teacache_thresh", "coefficients", "use_ret_steps", "infer_steps")
_LIGHTX2V_THRESHOLD = 0.15  # where `feature_caching: Tea` gives none
_LIGHTX2V_RET_STEPS = 5  # with `use_ret_steps`

GUIDE_KEYS = ("cache_adapter", "cache_config")
LIGHTX2V_KEYS = ("feature_caching", *_CACHE_SETTINGS)


def in_guides_words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `settings` with LightX2V's keys as the guide's; all others are left as they are.

    `feature_caching: Tea` names the cache. `infer_steps` is `cache_config.num_inference_steps`. Of two lists of
    `coefficients` the first belongs to `use_ret_steps: true`, with which the first five steps are computed. What is in
    `cache_config` wins. Raises ValueError for a `feature_caching` that is not known.
    """
    settings = dict(settings)
    caching = settings.pop("feature_caching", None)
    beside = {name: settings.pop(name) for name in _CACHE_SETTINGS if name in settings}
    if caching is not None:
        known = _FEATURE_CACHING.get(str(caching).lower())
        if known is None:
            raise ValueError(f"feature_caching: found {caching!r}; expected Tea or NoCaching")
        settings.setdefault("cache_adapter", known)
        if known == TEA_CACHE:
            beside.setdefault("teacache_thresh", _LIGHTX2V_THRESHOLD)
    if beside:
        inside = settings.get("cache_config") or {}
        inside = inside if isinstance(inside, Mapping) else inside.model_dump(exclude_unset=True)
        beside = _cache_settings(beside)
        if "rel_l1_thresh" in inside:
            beside.pop("teacache_thresh", None)
        settings["cache_config"] = {**beside, **inside}
    return settings


def _cache_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """LightX2V's settings of the cache as those of `TeaCacheConfig`."""
    settings = dict(found)
    from_first_steps = settings.pop("use_ret_steps", False) is True
    if from_first_steps:
        settings["ret_steps"] = _LIGHTX2V_RET_STEPS
    several = settings.get("coefficients")
    if isinstance(several, list | tuple) and len(several) == 2 and all(isinstance(one, list) for one in several):
        settings["coefficients"] = several[0 if from_first_steps else 1]
    if "infer_steps" in settings:
        settings["num_inference_steps"] = settings.pop("infer_steps")
    return settings
