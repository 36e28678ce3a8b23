"""The settings that suit each family's published checkpoints: what the shipped configs say, and what is taken where a
user names a data set and a model only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# How sigmas are shifted with the picture's size: the base_image_seq_len, max_image_seq_len, base_shift and max_shift
# in scheduler_config.json of the checkpoints.
_QWEN_SHIFT = {
    "train.timestep_sampling": "resolution_shifted",
    "train.shift_tokens": (256, 8192),
    "train.shift_exponents": (0.5, 0.9),
}
_FLUX_SHIFT = {
    "train.timestep_sampling": "resolution_shifted",
    "train.shift_tokens": (256, 4096),
    "train.shift_exponents": (0.5, 1.15),
}
_TRUE_GUIDANCE = {"generate.true_cfg_scale": 4.0}  # what the model cards of Qwen-Image use

_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "qwen-image": _QWEN_SHIFT | _TRUE_GUIDANCE,
    "qwen-image-edit": _QWEN_SHIFT | _TRUE_GUIDANCE,
    "qwen-image-edit-plus": _QWEN_SHIFT | _TRUE_GUIDANCE,
    "flux": _FLUX_SHIFT,
    "flux-schnell": {},  # its scheduler does not shift: it was distilled for four steps at fixed places
    "flux-kontext": _FLUX_SHIFT,
}


def suggested_settings(family_name: str) -> Mapping[str, Any]:
    """Settings by dotted name that differ from the general defaults for this family; none for an unknown one."""
    return MappingProxyType(_SETTINGS.get(family_name, {}))
