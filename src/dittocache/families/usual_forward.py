"""What most denoisers have in common: plain argument names, noise tokens first, no cache of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dittocache.families.transformer_side import Polynomial, TokenLayout


class UsualForward:
    """The part of a `StepAdapter` that a model with a usual forward need not write."""

    polynomials: Mapping[str, Polynomial] = {}
    no_reference_cache = ""

    def run_arguments(self, forward_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments as they are."""
        return forward_kwargs

    def begin_run(self, forward_kwargs: Mapping[str, Any]) -> None:
        """Nothing is remembered."""

    def must_run(self, forward_kwargs: Mapping[str, Any]) -> bool:
        """No step leaves anything behind in the model."""
        return False

    def noise_tokens(
        self, stream: torch.Tensor, layout: TokenLayout, forward_kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The first tokens."""
        return stream[:, : layout.noise]

    def noisy_latents(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> torch.Tensor:
        """The noise's part of `hidden_states`; the output is the velocity towards the noise."""
        return self.noise_tokens(forward_kwargs["hidden_states"], layout, forward_kwargs)


class FillsOwnCache(UsualForward):
    """A model whose forward can keep keys and values by itself: `kv_cache` and `kv_cache_mode`."""

    def must_run(self, forward_kwargs: Mapping[str, Any]) -> bool:
        """The step that fills the cache: without it the next one would find none."""
        return forward_kwargs.get("kv_cache_mode") == "extract"
