"""A family whose text encoders hold their weights in 8 bits while they encode: half the memory, rounded weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch

from dittocache.families.base import Family

FORM = "float8_e4m3fn"

# What stays as it is: norms, and layers whose weights other code looks at (T5 casts its input to the dtype of `wo`,
# `lm_head` may share its weight with the embedding of tokens).
_UNTOUCHED = ("pos_embed", "patch_embed", "norm", "embed", "wo", "lm_head")


def with_fp8_text_encoders(family: Family) -> Family:
    """The same family, but for `load_pipeline`, which brings text encoders to 8 bits before they go to the device."""
    return cast(Family, _Fp8TextEncoders(family))


def fp8_forms(family: Family) -> Mapping[str, str]:
    """Text encoder -> the format that its weights are held in, for the keys of what it makes."""
    return {encoder: FORM for encoder in family.encoders if encoder != "vae"}


class _Fp8TextEncoders:
    """Stands before a family, and answers as it does."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def load_pipeline(
        self, model: str, components: Collection[str], dtype: torch.dtype, device: str | torch.device
    ) -> Any:
        """As the family's; weights of linear layers are float8 (e4m3), what they compute is `dtype`."""
        from diffusers.hooks import apply_layerwise_casting

        text = [name for name in components if name in fp8_forms(self._family)]
        # Brought to its final size before it goes to the device, which may not hold it in full.
        pipe = self._family.load_pipeline(model, components, dtype, "cpu" if text else device)
        for name in text:
            apply_layerwise_casting(getattr(pipe, name), getattr(torch, FORM), dtype, skip_modules_pattern=_UNTOUCHED)
        return pipe.to(device)
