"""The sample tensor within what a transformer's forward returns, and the same return value around another one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dittocache.errors import StepCacheError


def sample_of(output: Any) -> torch.Tensor:
    """The predicted velocity `(B, tokens, C)` of a tuple, a tensor or a model output; StepCacheError for others."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    sample = getattr(output, "sample", None)
    if isinstance(sample, torch.Tensor):
        return sample
    raise StepCacheError(
        f"the transformer returned a {type(output).__name__}; to predict its output it must return a tensor, a tuple "
        "that begins with one, or an object with `sample`. Choose a prediction of the residual for this model"
    )


def with_sample(output: Any, sample: torch.Tensor) -> Any:
    """A return value of the kind of `output` that holds `sample`."""
    if isinstance(output, torch.Tensor):
        return sample
    if isinstance(output, tuple):
        return (sample,)
    return dataclasses.replace(output, sample=sample)
