"""The sample tensor within what a transformer's forward returns, and the same return value around another one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dittocache.errors import StepCacheError


def sample_of(output: Any) -> torch.Tensor:
    """The predicted velocity `(B, tokens, C)` of a tuple, a tensor or a model output.

    A list with a tensor for each sample is stacked, `(B, ...)`. StepCacheError for anything else.
    """
    sample = _held(output)
    if isinstance(sample, torch.Tensor):
        return sample
    if _are_tensors(sample):
        shapes = {tuple(one.shape) for one in sample}
        if len(shapes) == 1:
            return torch.stack(sample)
        raise StepCacheError(
            f"the transformer returned samples of {len(shapes)} shapes: {sorted(shapes)}. To predict its output, all "
            "pictures of a batch must be of one size: ask for each size by itself"
        )
    raise StepCacheError(
        f"the transformer returned a {type(output).__name__}; to predict its output it must return a tensor, a list "
        "of tensors, a tuple that begins with either, or an object with `sample`. Choose a prediction of the residual "
        "for this model"
    )


def with_sample(output: Any, sample: torch.Tensor) -> Any:
    """A return value of the kind of `output` that holds `sample`."""
    held: Any = sample if isinstance(_held(output), torch.Tensor) else list(sample.unbind())
    if isinstance(output, torch.Tensor | list):
        return held
    if isinstance(output, tuple):
        return (held,)
    # What else there is belongs to the step that returned it, such as a cache that it filled.
    required = (one.name for one in dataclasses.fields(output) if not _has_default(one))
    return type(output)(**{**{name: getattr(output, name) for name in required}, "sample": held})


def _held(output: Any) -> Any:
    """The tensor, or the list of tensors, within a return value."""
    if isinstance(output, torch.Tensor | list):
        return output
    return output[0] if isinstance(output, tuple) and output else getattr(output, "sample", None)


def _are_tensors(sample: Any) -> bool:
    return isinstance(sample, list) and bool(sample) and all(isinstance(one, torch.Tensor) for one in sample)


def _has_default(one: dataclasses.Field[Any]) -> bool:
    return one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING
