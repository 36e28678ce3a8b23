"""Which families there are, and which one a checkpoint or a transformer belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from torch import nn

from dittocache.errors import ModelError
from dittocache.families.base import Family
from dittocache.families.flux import Flux
from dittocache.families.flux2_transformer import Flux2TransformerAdapter
from dittocache.families.flux_kontext import FluxKontext
from dittocache.families.loading import model_index
from dittocache.families.qwen_image import QwenImage
from dittocache.families.qwen_image21_transformer import QwenImage21TransformerAdapter
from dittocache.families.qwen_image_edit import QwenImageEdit
from dittocache.families.qwen_image_edit_plus import QwenImageEditPlus
from dittocache.families.transformer_side import StepAdapter, TransformerAdapter
from dittocache.families.z_image_transformer import ZImageTransformerAdapter

_families: tuple[Family, ...] = (
    QwenImage(),
    QwenImageEdit(),
    QwenImageEditPlus(),
    Flux(),
    Flux(name="flux-schnell", guidance=False),
    FluxKontext(),
)
_KEEP_THEIR_OWN: Mapping[str, str] = MappingProxyType(
    {
        "QwenImageTransformerCausal2DModel": "its pipeline keeps the keys and values of references by itself. To use "
        "the checkpoint with stock pipelines, load it as QwenImageTransformer2DModel, call "
        "isolate_references(pipe, apart=True), and take mode 'exact'",
    }
)
"""Transformers of other projects whose references are exact, by class, and what to do about them."""
_sampled_only = (QwenImage21TransformerAdapter(), Flux2TransformerAdapter(), ZImageTransformerAdapter())
FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _families})


def get_family(name: str) -> Family:
    """The family of this name, as configs write it; raises ModelError with the nearest name for any other."""
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(name, FAMILIES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ModelError(f"no model family {name!r}; there are {', '.join(FAMILIES)}{hint}")


def family_of_model(model: str | Path) -> Family:
    """The family of a checkpoint (folder or hub id), by the pipeline class in its `model_index.json`.

    Raises ModelError when there is no checkpoint, or its pipeline belongs to no family.
    """
    pipeline_class_name = model_index(model).get("_class_name")
    matching = [family for family in FAMILIES.values() if family.pipeline_class_name == pipeline_class_name]
    if not matching:
        supported = sorted({family.pipeline_class_name for family in FAMILIES.values()})
        raise ModelError(f"{str(model)!r} is a {pipeline_class_name}; supported pipelines are {', '.join(supported)}")
    if len(matching) == 1:
        return matching[0]
    from diffusers import FluxTransformer2DModel

    config = FluxTransformer2DModel.load_config(str(model), subfolder="transformer")
    guided = bool(config["guidance_embeds"])
    return get_family("flux" if guided else "flux-schnell")


def step_adapters() -> Sequence[StepAdapter]:
    """What the step cache knows of every denoiser: those of the families, and those that are only sampled from."""
    families = {family.transformer.class_name: family.transformer for family in FAMILIES.values()}
    return [*families.values(), *_sampled_only]


def step_adapter_of(module: nn.Module) -> StepAdapter | None:
    """What the step cache knows of a denoiser, by its class or a base class; None for an unknown one."""
    adapters = {adapter.class_name: adapter for adapter in step_adapters()}
    return next((adapters[base.__name__] for base in type(module).__mro__ if base.__name__ in adapters), None)


def adapter_of(module: nn.Module) -> TransformerAdapter:
    """The transformer side of the family of a denoiser, by its class or a base class.

    Raises ModelError for an unknown one, and for one whose references cannot be told to the reference KV cache.
    """
    names = [base.__name__ for base in type(module).__mro__]
    adapters = {family.transformer.class_name: family.transformer for family in FAMILIES.values()}
    for name in names:
        if name in adapters:
            return adapters[name]
    supported = ", ".join(adapters)
    if (own := next((_KEEP_THEIR_OWN[name] for name in names if name in _KEEP_THEIR_OWN), None)) is not None:
        raise ModelError(f"there is no reference KV cache for {type(module).__name__}: {own}")
    if (sampled := step_adapter_of(module)) is not None:
        raise ModelError(
            f"there is no reference KV cache for {type(module).__name__}: {sampled.no_reference_cache}. The step cache "
            f"works; transformers with both are {supported}"
        )
    raise ModelError(f"no family knows the transformer {type(module).__name__}; supported are {supported}")
