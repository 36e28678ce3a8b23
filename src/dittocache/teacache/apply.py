"""The spec's one-line door: `setup_cache(pipeline, "tea_cache", {...})`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dittocache.errors import ConfigError, StepCacheError
from dittocache.teacache.adapter import TeaCacheAdapter
from dittocache.teacache.config import TeaCacheConfig

CACHE_ADAPTERS = ("none", "tea_cache")


def setup_cache(
    target: Any, cache_adapter: str = "tea_cache", cache_config: TeaCacheConfig | Mapping[str, Any] | None = None
) -> TeaCacheAdapter | None:
    """Put the named cache on a pipeline or transformer and return its adapter; None for `none`.

    Args:
        target: a diffusers pipeline with a transformer, or the transformer.
        cache_adapter: `tea_cache` or `none`.
        cache_config: settings of TeaCache, as a mapping or a `TeaCacheConfig`.

    Raises StepCacheError for an unknown cache or model, ConfigError naming every setting that is wrong.
    """
    if cache_adapter not in CACHE_ADAPTERS:
        raise StepCacheError(f"unknown cache_adapter {cache_adapter!r}; expected one of {', '.join(CACHE_ADAPTERS)}")
    if cache_adapter == "none":
        return None
    if not isinstance(cache_config, TeaCacheConfig):
        try:
            cache_config = TeaCacheConfig.model_validate(dict(cache_config or {}))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            raise ConfigError("cache_config is not valid:", problems) from error
    adapter = TeaCacheAdapter(cache_config)
    adapter.apply(target)
    return adapter
