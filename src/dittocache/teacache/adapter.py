"""Applies TeaCache to a pipeline or a transformer and takes it off again: the spec's `TeaCacheAdapter`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from diffusers.hooks.hooks import HookRegistry

from dittocache.errors import StepCacheError
from dittocache.families.denoiser import Denoiser, find_denoiser, installed_hook, remove_hook
from dittocache.families.polynomials import range_of
from dittocache.families.run_clock import RunClock
from dittocache.families.transformer_side import StepAdapter
from dittocache.teacache.choice import step_cache
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.extractors import (
    EXTRACTOR_REGISTRY,
    family_adapter,
    get_extractor,
    polynomial_of,
)
from dittocache.teacache.hook import HOOK_NAME, StepCache, TeaCacheHook
from dittocache.teacache.policy import GatePolicy
from dittocache.teacache.profile import profile_for
from dittocache.teacache.stack import BlockStack, ExtractorStack, StockStack, WholeForward

logger = logging.getLogger(__name__)


class TeaCacheAdapter:
    """Puts TeaCache on transformers, and takes it off.

    Args:
        config: the settings; they are the same for every transformer it is applied to.
    """

    def __init__(self, config: TeaCacheConfig | None = None) -> None:
        self.config = config or TeaCacheConfig()

    def apply(
        self,
        target: Any,
        clock: RunClock | None = None,
        say: Callable[[str], None] = logger.warning,
        refine: Callable[[StepCache], StepCache] = lambda cache: cache,
    ) -> TeaCacheHook:
        """Skip steps of `target`, a pipeline or a bare transformer, from its next call on.

        Args:
            target: a diffusers pipeline with a transformer, or the transformer.
            clock: shared with other hooks on the transformer; its own by default.
            say: takes remarks for the user.
            refine: changes what the settings chose before it is put on.

        Raises StepCacheError where TeaCache is on already, the model type is unknown or belongs to another model,
        and ModelError where there is no transformer.
        """
        denoiser = find_denoiser(target)
        if installed_hook(denoiser.module, HOOK_NAME) is not None:
            raise StepCacheError(
                f"TeaCache is on for this {type(denoiser.module).__name__} already; remove it before applying it again"
            )
        if self.config.profile is not None:
            profile = profile_for(self.config, denoiser, say)
            return TeaCacheAdapter(profile.settings_for(self.config)).apply(target, clock, say, profile.watched(say))
        model_type = self._model_type(denoiser)
        family = None if model_type is None else family_adapter(model_type)
        if clock is None:
            clock = RunClock(family, denoiser.scheduler, self.config.num_inference_steps, say)
        stack: BlockStack = WholeForward() if model_type is None else _stack(model_type, family)
        chosen = refine(step_cache(self.config, self._policy(model_type), stack))
        hook = TeaCacheHook(chosen, stack, clock, say)
        HookRegistry.check_if_exists_or_initialize(denoiser.module).register_hook(hook, HOOK_NAME)
        return hook

    def reset(self, target: Any) -> None:
        """Forget the run that is going on, as after an interrupt; raises StepCacheError where TeaCache is off."""
        module = find_denoiser(target).module
        self._hook(module).reset_state(module)

    def remove(self, target: Any) -> None:
        """Take TeaCache off; raises StepCacheError where it is not on."""
        module = find_denoiser(target).module
        self._hook(module)
        remove_hook(module, HOOK_NAME)

    def _hook(self, module: Any) -> TeaCacheHook:
        hook = installed_hook(module, HOOK_NAME)
        if not isinstance(hook, TeaCacheHook):
            raise StepCacheError(f"TeaCache is not on for this {type(module).__name__}; apply it first")
        return hook

    def _model_type(self, denoiser: Denoiser) -> str | None:
        """A name of the registry; None for a model that nobody knows, where its output alone is predicted."""
        names = denoiser.class_names
        if self.config.model_type is None:
            known = [name for name in names if name in EXTRACTOR_REGISTRY and _fits(name, names)]
            if known:
                return known[0]
            if not self.config.needs_extractor:
                return None
            raise StepCacheError(
                f"TeaCache knows no {' or '.join(names[:2])}: model_type must be provided in cache_config. "
                f"Available types: {', '.join(sorted(EXTRACTOR_REGISTRY))}. Add yours with register_extractor, or take "
                "gate 'error', which needs none"
            )
        get_extractor(self.config.model_type)
        family = family_adapter(self.config.model_type)
        if family is not None and family.class_name not in names:
            raise StepCacheError(
                f"model_type {self.config.model_type!r} is for a {family.class_name}, but the transformer is a "
                f"{type(denoiser.module).__name__}; leave model_type out, or name the right one"
            )
        return self.config.model_type

    def _policy(self, model_type: str | None) -> GatePolicy:
        default = polynomial_of(model_type)
        coefficients = self.config.coefficients or default.coefficients
        # A range belongs to the coefficients that were fitted on it.
        fitted = default.fitted_range if coefficients == default.coefficients else range_of(coefficients)
        return GatePolicy(
            threshold=self.config.rel_l1_thresh,
            coefficients=coefficients,
            fitted_range=self.config.fitted_range or fitted,
            ret_steps=self.config.ret_steps,
            cutoff_steps=self.config.cutoff_steps,
            max_consecutive_skips=self.config.max_consecutive_skips,
        )


def _fits(model_type: str, names: Sequence[str]) -> bool:
    """Whether `model_type` is for a transformer of these class names; a user's own extractor is believed."""
    family = family_adapter(model_type)
    return family is None or family.class_name in names


def _stack(model_type: str, family: StepAdapter | None) -> BlockStack:
    return ExtractorStack(get_extractor(model_type)) if family is None else StockStack(family)
