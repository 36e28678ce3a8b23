"""How a run's tensors are stored: the setting, what it puts into recipes, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dittocache.errors import RecordCorruptError, RecordMissingError

FP8_FORM = "fp8_e4m3_token"

ReadBase = Callable[[str], torch.Tensor]
"""Gives the restored tensor of a base record by its key; raises CacheError where it cannot."""


@dataclass(frozen=True)
class Storage:
    """How the artifacts of a run are stored.

    Attributes:
        dtype: `native`; `float16` for every artifact that an encoder makes in float32; `fp8` for prompt embeddings.
        shared_prefix: store of `prompt_embeds` only those rows that differ from the sample's `empty_prompt_embeds`.
    """

    dtype: Literal["native", "float16", "fp8"] = "native"
    shared_prefix: bool = False


@dataclass(frozen=True)
class StorageError:
    """What a form costs.

    Attributes:
        relative_rms: root mean square of the error over that of the original.
        worst_token_cosine: smallest cosine between a row and its restored counterpart.
    """

    relative_rms: float
    worst_token_cosine: float


def storage_field(artifact_name: str, settings: Storage, base_key: str | None) -> dict[str, Any] | None:
    """The recipe's field `storage`; None, and no field, for the encoder's own dtype and all rows.

    Args:
        artifact_name: fp8 is for `prompt_embeds` and `empty_prompt_embeds`; rows are shared by `prompt_embeds` alone.
        base_key: of the sample's `empty_prompt_embeds`; None where there is none to share rows with.
    """
    field: dict[str, Any] = {}
    if settings.dtype == "float16" and not artifact_name.endswith("_mask") and artifact_name != "img_shapes":
        field["dtype"] = "float16"
    if settings.dtype == "fp8" and artifact_name in ("prompt_embeds", "empty_prompt_embeds"):
        field["dtype"] = FP8_FORM
    if settings.shared_prefix and artifact_name == "prompt_embeds" and base_key is not None:
        field["rows_shared_with"] = base_key
    return field or None


def base_key_of(recipe: Mapping[str, Any]) -> str | None:
    """The key of the record that a recipe shares rows with."""
    field = recipe.get("storage")
    key = field.get("rows_shared_with") if isinstance(field, Mapping) else None
    return key if isinstance(key, str) else None


def bases_for(key: str, read: ReadBase) -> ReadBase:
    """`read` for the base of the record `key`: a base that is missing or corrupt leaves that record unreadable too.

    Neither is wrong in itself then, and both are readable again once the base was encoded anew with the same result.
    """

    def read_base(base_key: str) -> torch.Tensor:
        try:
            return read(base_key)
        except (RecordMissingError, RecordCorruptError) as error:
            raise RecordMissingError(
                f"record {key} shares rows with record {base_key}, which cannot be read: {error}"
            ) from error

    return read_base


def storage_error(original: torch.Tensor, restored: torch.Tensor) -> StorageError:
    """What storing has cost; rows are along the last dimension. Raises ValueError when the shapes differ."""
    if original.shape != restored.shape:
        raise ValueError(f"shapes differ: {list(original.shape)} and {list(restored.shape)}")
    before, after = original.double(), restored.double()
    if before.numel() == 0:
        return StorageError(0.0, 1.0)
    power = before.square().mean().sqrt().item()
    error = (after - before).square().mean().sqrt().item()
    width = before.shape[-1] if before.ndim else 1
    before, after = before.reshape(-1, width), after.reshape(-1, width)
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    cosine[(before == after).all(dim=-1)] = 1.0  # zero rows have no direction
    return StorageError(error / power if power else float(error > 0), cosine.min().item())
