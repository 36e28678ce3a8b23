"""From the settings to the rule of one run: what is exact, and what is usual where nothing is said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from torch import nn

from dittocache.errors import ReferenceCacheError
from dittocache.families.active_adapters import working_adapters
from dittocache.families.transformer_side import TransformerAdapter
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.policy import EXACT, RefreshRule

Visibility = Literal["isolated", "apart"]
"""References of a sample see each other and nothing else; or each sees itself only."""

VISIBILITY_KEY = "reference_visibility"
"""In a transformer's configuration, in the header of a LoRA's file and in its PEFT configuration's `auto_mapping`."""

ISOLATED_CHECKPOINTS: Mapping[str, Visibility] = {"Qwen-Image-Edit-Causal": "apart"}
"""Published checkpoints that were trained with isolated references, by the last part of their names."""


def rule_of(config: ReferenceKVConfig, steps: int | None, exact: bool) -> RefreshRule:
    """When a run of `steps` steps refreshes its references; None: nobody knows how many there are."""
    if config.mode == "exact" or (exact and config.mode == "auto" and config.refresh is None):
        return EXACT
    refresh = config.refresh
    if refresh is None:
        rule = usual_rule(steps)
    elif refresh == "adaptive":
        rule = RefreshRule(tolerance=config.drift_tolerance, extrapolate=True)
    elif isinstance(refresh, int):
        rule = RefreshRule(every=refresh, extrapolate=refresh > 1)
    else:
        rule = RefreshRule(steps=refresh, extrapolate=len(refresh) > 1)
    if config.extrapolate is not None:
        rule = RefreshRule(rule.every, rule.steps, rule.tolerance, config.extrapolate)
    return rule


def usual_rule(steps: int | None) -> RefreshRule:
    """What is best for most pictures, and better than fewer plain steps in the same time (docs/reference-kv.md).

    Measured on the bundled model, 32 held-out edits, PSNR against uncached pictures, mean / worst: of 8 steps the first
    alone 44.3 / 29.4 dB, with steps 2 and 5 as a line 58.2 / 50.4, every 3rd as a line 59.7 / 34.7; of 4 steps the
    first two 51.7 / 46.0, the first and the third 58.2 / 28.1; of 28 every 4th, as a line, 63.3 / 57.6.
    """
    if steps is None or steps >= 12:
        return RefreshRule(every=4, extrapolate=True)
    if steps >= 8:
        return RefreshRule(steps=(0, steps // 4, 5 * steps // 8), extrapolate=True)
    return RefreshRule(steps=(0, max(1, steps // 4)))


def trained_visibility(module: nn.Module) -> Visibility | None:
    """What the references of this checkpoint see, where it is known to have been trained with isolated ones.

    From an active LoRA, from `reference_visibility` in the transformer's configuration, or from the name that it was
    loaded by.
    """
    config = getattr(module, "config", {})
    said = lora_visibility(module) or _known(config.get(VISIBILITY_KEY))
    if said is not None:
        return said
    parts = re.split(r"[/\\]|--", str(config.get("_name_or_path") or ""))
    return next((ISOLATED_CHECKPOINTS[part] for part in parts if part in ISOLATED_CHECKPOINTS), None)


def lora_visibility(module: nn.Module) -> Visibility | None:
    """What the references see with the LoRAs at work, where one of them was trained by this library with isolated ones.

    PEFT's `auto_mapping` is the one part of a LoRA's configuration that takes any entry, and `load_lora_weights` brings
    it along from the file.
    """
    configs: Mapping[str, Any] = getattr(module, "peft_config", {})
    for name in working_adapters(module):
        entries = getattr(configs.get(name), "auto_mapping", None)
        said = _known(entries.get(VISIBILITY_KEY)) if isinstance(entries, Mapping) else None
        if said is not None:
            return said
    return None


def _known(said: object) -> Visibility | None:
    return cast(Visibility, said) if said in get_args(Visibility) else None


def check_adapters(config: ReferenceKVConfig, module: nn.Module, isolated: bool, by_cache: bool) -> None:
    """Raise ReferenceCacheError where LoRAs came or went while the cache is on, and references see what they must not.

    Args:
        isolated: whether references are isolated.
        by_cache: whether the cache isolated them, because the checkpoint or a LoRA was trained so.
    """
    visibility, again = trained_visibility(module), "take the reference KV cache off and put it on again"
    if visibility is not None and not isolated and config.mode != "approx":
        raise ReferenceCacheError(
            f"an active LoRA of this {type(module).__name__} was trained with isolated references ({visibility}), and "
            f"was loaded while the reference KV cache was on: {again}, which isolates them"
        )
    if visibility is None and by_cache:  # a checkpoint stays what it is
        raise ReferenceCacheError(
            f"references of this {type(module).__name__} were isolated for a LoRA that is active no longer: {again}"
        )


def check_settings(config: ReferenceKVConfig, adapter: TransformerAdapter, module: nn.Module) -> None:
    """Raise ReferenceCacheError where this checkpoint cannot do what the settings ask for, and say why."""
    name, exact, blocks = type(module).__name__, adapter.reference_is_exact(module), len(adapter.blocks(module))
    if config.mode == "exact" and not exact:
        raise ReferenceCacheError(
            f"mode 'exact' asks this {name} for references that never change, but they are not isolated: they see the "
            "noise, or follow the timestep. Neither the checkpoint's name nor its configuration (reference_visibility) "
            "nor an active LoRA says that it was trained otherwise. Load a LoRA that was trained so (with one of "
            "another library, call isolate_references(pipe) too), or take mode 'approx'"
        )
    if config.reuse_across_calls and not exact:
        raise ReferenceCacheError(
            f"reuse_across_calls is for references that never change, but those of this {name} are not isolated: they "
            "are others in each call; leave it out"
        )
    if config.freeze_from_layer is None:
        return
    if exact:
        raise ReferenceCacheError(
            f"references of this {name} are isolated and never change, so no layer need compute them at every step; "
            "leave freeze_from_layer out"
        )
    if config.freeze_from_layer >= blocks:
        raise ReferenceCacheError(
            f"freeze_from_layer is {config.freeze_from_layer}, but this {name} has the layers 0 to {blocks - 1}"
        )
