"""The transformer to put caches on, from a pipeline or by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dittocache.errors import ModelError

REFERENCE_KV_HOOK = "dittocache_reference_kv"
ISOLATION_HOOK = "dittocache_isolated_references"
"""Hooks that questions of other rooms are about."""


@dataclass(frozen=True)
class Denoiser:
    """A transformer, and what is known of its surroundings.

    Attributes:
        module: the transformer, without the shell of `torch.compile`.
        scheduler: the pipeline's, None for a bare transformer.
        pipeline_class_name: None for a bare transformer.
    """

    module: nn.Module
    scheduler: Any = None
    pipeline_class_name: str | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names that the model may be known by, the most telling first."""
        pipeline = () if self.pipeline_class_name is None else (self.pipeline_class_name,)
        return (*pipeline, *(base.__name__ for base in type(self.module).__mro__[:-1]))


def find_denoiser(target: Any) -> Denoiser:
    """The transformer of a diffusers pipeline, or `target` itself where it is a module.

    Raises ModelError where there is none, and where a cache of diffusers is on: its hooks skip blocks too.
    """
    from diffusers.utils.torch_utils import unwrap_module

    if isinstance(target, nn.Module):
        denoiser = Denoiser(unwrap_module(target))
    elif isinstance(getattr(target, "transformer", None), nn.Module):
        denoiser = Denoiser(
            unwrap_module(target.transformer), getattr(target, "scheduler", None), type(target).__name__
        )
    else:
        raise ModelError(
            f"found no transformer in {type(target).__name__}; expected a diffusers pipeline with a loaded "
            "`transformer`, or the transformer itself"
        )
    if getattr(denoiser.module, "is_cache_enabled", False):
        raise ModelError(
            f"a cache of diffusers is on for this {type(denoiser.module).__name__}; call its disable_cache() first"
        )
    return denoiser


def installed_hook(module: nn.Module, name: str) -> Any:
    """The diffusers hook of this name on `module`, None where there is none; changes nothing."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def is_isolated(module: nn.Module) -> bool:
    """Whether reference tokens of this transformer see reference tokens only (`isolate_references`)."""
    return any(installed_hook(part, ISOLATION_HOOK) is not None for part in module.modules())


def remove_hook(module: nn.Module, name: str) -> None:
    """Take the named diffusers hook off `module` and leave nothing behind that was not there without it."""
    from diffusers.hooks.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.remove_hook(name, recurse=False)
    if registry.hooks:
        return
    del module._diffusers_hook
    # diffusers puts the class's own forward back as an attribute of the instance: a deep copy would call the original.
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module:
        del module.__dict__["forward"]
