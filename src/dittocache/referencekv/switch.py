"""The reference KV cache as a switch on a pipeline: on or off from call to call, with the names of the specification.

    enable_image_kv_cache(pipe)
    pipe(image=picture, prompt="make it red", use_image_kv_cache=True)

`cached(pipe, reference_kv=...)` does the same within a `with`, and writes down what happened.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.families.denoiser import find_denoiser, installed_hook
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.hook import HOOK_NAME, ReferenceKVHook, apply_reference_kv, remove_reference_kv

ARGUMENT = "use_image_kv_cache"
SESSION_HOOK = "dittocache_session"
STEP_CACHE_HOOK = "dittocache_teacache"
_STOCK = "_dittocache_stock_class"
_CONFIG = "_dittocache_reference_kv"


def set_image_token_cache_enabled(target: Any, enabled: bool = True, config: ReferenceKVConfig | None = None) -> None:
    """Turn the reference KV cache of a pipeline or transformer on for all calls from here on, or off.

    Turned off, nothing of it is left. Within a session that has it, it is only paused.

    Args:
        config: settings; those that it has, else the defaults, when left out.

    Raises ReferenceCacheError where references cannot be cached, or the cache is on with other settings; ModelError
    where there is no transformer.
    """
    hook = _hook_of(target)
    if not enabled:
        if hook is not None and installed_hook(find_denoiser(target).module, SESSION_HOOK) is not None:
            hook.enabled = False
            hook.forget()
        elif hook is not None:
            remove_reference_kv(target)
        return
    if hook is None:
        _apply(target, config)
        return
    if config is not None and config != hook.config:
        raise ReferenceCacheError(
            f"the reference KV cache is on with other settings ({hook.config.in_short}); turn it off first"
        )
    hook.enabled = True


def clear_image_token_caches(target: Any) -> None:
    """Free the keys and values that are kept for a pipeline or transformer; the next step computes them anew."""
    hook = _hook_of(target)
    if hook is not None:
        hook.forget()


def enable_image_kv_cache(pipe: Any, config: ReferenceKVConfig | None = None) -> Any:
    """Let `pipe(...)` take `use_image_kv_cache`: True or False for that call, None for what is set; returns `pipe`.

    The setting of before is back after the call, also on an exception, and nothing that was kept is left. Until
    `disable_image_kv_cache`. `set_image_token_cache_enabled` says what is set, which is off at first.

    Args:
        config: settings of the cache.

    Raises ModelError for anything but a pipeline with a transformer.
    """
    find_denoiser(pipe)
    stock = getattr(type(pipe), _STOCK, type(pipe))
    if not callable(pipe) or not hasattr(pipe, "transformer"):
        raise ModelError(f"use_image_kv_cache is an argument of a pipeline's call, found a {type(pipe).__name__}")
    if stock is type(pipe):
        pipe.__class__ = _with_argument(stock)
    object.__setattr__(pipe, _CONFIG, config or ReferenceKVConfig())
    return pipe


def disable_image_kv_cache(pipe: Any) -> Any:
    """Make `pipe` the stock pipeline again and turn the cache off; returns `pipe`."""
    set_image_token_cache_enabled(pipe, False)
    stock = getattr(type(pipe), _STOCK, None)
    if stock is not None:
        pipe.__class__ = stock
        object.__delattr__(pipe, _CONFIG)
    return pipe


@contextmanager
def for_one_call(pipe: Any, wanted: bool | None, config: ReferenceKVConfig | None = None) -> Iterator[None]:
    """The cache on or off within; afterwards the setting of before is back, and nothing of the call is kept.

    Args:
        wanted: None: as it is set.
        config: settings where it has to be turned on; else those it was given.
    """
    hook, installed = _hook_of(pipe), False
    before = hook is not None and hook.enabled
    if hook is None and wanted:
        hook, installed = _apply(pipe, config), True
    if hook is None:
        yield
        return
    module = find_denoiser(pipe).module
    hook.enabled = before if wanted is None else wanted
    hook.reset_state(module)
    try:
        yield
    finally:
        if installed:
            remove_reference_kv(pipe)
        else:
            hook.reset_state(module)
            hook.enabled = before


def _with_argument(stock: type) -> type:
    """A class like `stock` whose call takes the argument; it goes by the same name, as saved pipelines name it."""
    call = stock.__call__

    @wraps(call)
    def with_argument(self: Any, *args: Any, use_image_kv_cache: bool | None = None, **kwargs: Any) -> Any:
        with for_one_call(self, use_image_kv_cache):
            return call(self, *args, **kwargs)

    signature = inspect.signature(call)
    parameters = list(signature.parameters.values())
    extra = inspect.Parameter(ARGUMENT, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=bool | None)
    place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    signature = signature.replace(parameters=[*parameters[:place], extra, *parameters[place:]])
    with_argument.__signature__ = signature  # type: ignore[attr-defined]
    same = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (stock,), {**same, "__call__": with_argument, _STOCK: stock})


def _apply(target: Any, config: ReferenceKVConfig | None) -> ReferenceKVHook:
    module = find_denoiser(target).module
    if any(installed_hook(module, name) is not None for name in (SESSION_HOOK, STEP_CACHE_HOOK)):
        raise ReferenceCacheError(
            f"a step cache or a session is on for this {type(module).__name__}: it must stand around the reference KV "
            "cache, so that one comes first; give both to one cached(...), or turn the reference cache on before"
        )
    return apply_reference_kv(target, config or _config_of(target))


def _hook_of(target: Any) -> ReferenceKVHook | None:
    hook: ReferenceKVHook | None = installed_hook(find_denoiser(target).module, HOOK_NAME)
    return hook


def _config_of(target: Any) -> ReferenceKVConfig:
    config: ReferenceKVConfig = getattr(target, _CONFIG, None) or ReferenceKVConfig()
    return config
