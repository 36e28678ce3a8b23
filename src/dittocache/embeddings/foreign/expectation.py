"""What a sample's tensors must be like, from the plan and the model's configuration, to hold foreign files against."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittocache.data.sample import Sample
from dittocache.embeddings.planning.identity import model_folder
from dittocache.embeddings.recipe import Recipe
from dittocache.errors import CacheError, ModelError
from dittocache.families.base import Family, Sizes

PACKED = 4  # one packed latent holds 2x2 latents
LATENTS = ("image_latents", "control_latents")
_WIDTH_FIELDS = ("hidden_size", "d_model")


@dataclass(frozen=True)
class Expected:
    """One sample's sizes.

    Attributes:
        grids: (height, width) in packed latents of the target and of each control.
    """

    grids: tuple[tuple[int, int], ...]

    def tokens(self, artifact: str) -> int:
        """How many packed latents `image_latents` or `control_latents` have."""
        grids = self.grids[:1] if artifact == "image_latents" else self.grids[1:]
        return sum(math.prod(grid) for grid in grids)


def expected_of(family: Family, sample: Sample, sizes: Sizes) -> Expected:
    """Sizes of a sample; reads the headers of its pictures. Raises DataError when one cannot be read."""
    shapes = family.encode(None, None, [sample], sizes, wanted=[{"img_shapes"}])[0]["img_shapes"]
    return Expected(tuple((int(height), int(width)) for _, height, width in shapes.tolist()))


class Widths:
    """Width of what each encoder of a checkpoint gives, from its configuration; None where that does not say.

    Args:
        model: folder of the checkpoint, or the id of one in the hub's local cache.
    """

    def __init__(self, model: str) -> None:
        self._folder = model_folder(model)
        self._known: dict[str, int | None] = {}

    def of(self, encoder: str) -> int | None:
        """Channels of a packed latent for `vae`, else the hidden size."""
        if encoder not in self._known:
            self._known[encoder] = _width(self._folder / encoder / "config.json", encoder)
        return self._known[encoder]


def check_tensor(artifact: str, tensor: torch.Tensor, recipe: Recipe, expected: Expected, widths: Widths) -> None:
    """Raise CacheError, saying what was found and expected, unless the tensor can be this artifact of this sample."""
    if artifact.endswith("_mask"):
        if tensor.dtype != torch.bool or tensor.ndim != 1:
            raise CacheError(f"the mask is {_kind(tensor)}; expected booleans of shape [tokens]")
        return
    if not tensor.is_floating_point():
        raise CacheError(f"it is {_kind(tensor)}; expected floating numbers")
    dimensions = 1 if "pooled" in artifact else 2
    if tensor.ndim != dimensions or not tensor.numel():
        wanted = "[width]" if dimensions == 1 else "[tokens, width]"
        raise CacheError(f"it is {_kind(tensor)}; expected shape {wanted} without a batch axis")
    width = widths.of(str(recipe["encoder"]["component"]))
    if width is not None and tensor.shape[-1] != width:
        raise CacheError(
            f"it is {_kind(tensor)}; the {recipe['encoder']['component']} of this model gives width {width}: it is "
            "another model's"
        )
    if artifact in LATENTS and tensor.shape[0] != expected.tokens(artifact):
        raise CacheError(
            f"it has {tensor.shape[0]} tokens; at this resolution the sample has {expected.tokens(artifact)} "
            f"({_grids(artifact, expected)}): it was cached at another size"
        )
    low, high = tensor.aminmax()  # NaN if any is; many times faster than looking at each value
    if not bool(torch.isfinite(low) and torch.isfinite(high)):
        raise CacheError(f"it holds values that are not finite ({tensor.dtype} overflows or the encoder failed)")


def dtype_note(tensor: torch.Tensor, recipe: Recipe) -> str | None:
    """Words for a tensor whose dtype is not the one that the plan's encoder computes in."""
    found, planned = str(tensor.dtype).removeprefix("torch."), str((recipe.get("encoder") or {}).get("dtype"))
    if not tensor.is_floating_point() or found == planned:
        return None
    return f"stored as {found}, as the file has it; the plan's encoders compute in {planned}"


def _width(config: Path, encoder: str) -> int | None:
    try:
        fields: dict[str, Any] = json.loads(config.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{config} cannot be read ({error}); download the checkpoint again") from error
    if encoder == "vae":
        channels = fields.get("z_dim", fields.get("latent_channels"))
        return None if channels is None else int(channels) * PACKED
    text = fields.get("text_config") or {}
    for name in _WIDTH_FIELDS:
        if (found := text.get(name, fields.get(name))) is not None:
            return int(found)
    return None


def _grids(artifact: str, expected: Expected) -> str:
    grids = expected.grids[:1] if artifact == "image_latents" else expected.grids[1:]
    return " + ".join(f"{height}x{width}" for height, width in grids)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
