"""Load a diffusers pipeline with the components asked for, and nothing else in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dittocache.errors import ModelError


def diffusers_class(name: str) -> Any:
    """A class of diffusers by its name."""
    import diffusers

    return getattr(diffusers, name)


def model_index(model: str | Path) -> dict[str, Any]:
    """The checkpoint's `model_index.json`; raises ModelError when `model` (a folder or hub id) has none."""
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(str(model)))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no diffusers pipeline found at {str(model)!r} ({error}); expected a folder with a model_index.json, "
            "or the id of a model on the Hugging Face hub"
        ) from error


def component_names(model: str | Path) -> tuple[str, ...]:
    """Names of the components that the checkpoint's `model_index.json` lists, in its order."""
    return tuple(
        name
        for name, entry in model_index(model).items()
        if not name.startswith("_") and isinstance(entry, (list, tuple)) and entry[0] is not None
    )


def load_components(
    pipeline_class_name: str,
    model: str | Path,
    components: Collection[str],
    dtype: torch.dtype,
    device: str | torch.device,
    builders: Mapping[str, Callable[[str], Any]] | None = None,
) -> Any:
    """A pipeline of exactly `pipeline_class_name` that holds only `components`; the others are None.

    Args:
        builders: for components that `from_pretrained` cannot load on this machine: a function of the model's path or
            id each.

    Raises ModelError when the checkpoint is missing, of another pipeline, or lacks one of the components.
    """
    index = model_index(model)
    found = index.get("_class_name")
    if found != pipeline_class_name:
        raise ModelError(
            f"{str(model)!r} is a {found}; expected a {pipeline_class_name}: choose the family of this model"
        )
    listed = component_names(model)
    absent = sorted(set(components) - set(listed))
    if absent:
        raise ModelError(f"{str(model)!r} has no component {', '.join(absent)}; it lists {', '.join(listed)}")
    wanted_builders = {name: build for name, build in (builders or {}).items() if name in components}
    omitted = {name: None for name in listed if name not in components or name in wanted_builders}
    pipeline_class = diffusers_class(pipeline_class_name)
    try:
        pipe = pipeline_class.from_pretrained(str(model), dtype=dtype, **omitted)
        for name, build in wanted_builders.items():
            setattr(pipe, name, build(str(model)))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {', '.join(sorted(components))} of {str(model)!r}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
