"""Folders that musubi-tuner cached into: safetensors files named by the picture's stem.

`{stem}_{W:04d}x{H:04d}_{arch}.safetensors` (the target's own size in pixels) holds `latents_FxHxW_dtype` `(C, F, H, W)`
and `latents_control_{i}_FxHxW_dtype`: mode of the posterior, normalised with the VAE's mean and standard deviation, as
diffusers' pipelines do, but not packed. `{stem}_{arch}_te.safetensors` holds `varlen_vl_embed_dtype` `(T, D)` and, as
`caption1` in its metadata, the prompt.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from dittocache.data.digests import status_of
from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.embeddings.foreign.expectation import LATENTS, Expected
from dittocache.embeddings.foreign.source import Foreign
from dittocache.embeddings.recipe import Recipe
from dittocache.embeddings.store.record import LENGTH_BYTES
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError

# By our family's name. Nothing in their files tells the two edit models apart.
ARCHITECTURES: Mapping[str, str] = {"qwen-image": "qi", "qwen-image-edit": "qie", "qwen-image-edit-plus": "qie"}

_TARGET = re.compile(r"latents_(\d+)x(\d+)x(\d+)_\w+")
_CONTROL = re.compile(r"latents_control_(\d+)_(\d+)x(\d+)x(\d+)_\w+")
_TEXT = re.compile(r"varlen_vl_embed_\w+")


class MusubiCache:
    """A musubi-tuner `cache_directory`. A `ForeignCache`.

    Args:
        folder: the cache directory.
        family_name: which architecture's files to look for.
        samples: of the data set; stems that several of them share name one file that only one of them wrote.

    Raises CacheError for a family whose files are not known, or a folder without any.
    """

    tool = "musubi-tuner"
    verified: Sequence[str] = (
        "the prompt, against the caption in the file",
        "the target's size in pixels, by the file's name; that pictures are not newer than the file",
        "the grid of latents against the resolution, widths against the model's configuration, finite values",
    )
    unverified: Sequence[str] = (
        "the pictures: files are named by stem and size, not by content",
        "the weights of the encoders: nothing in the files says which model made them",
        "the prompt template (edit or edit-plus), and at which size the text encoder saw the control pictures",
        "how pictures were resized and cropped",
        "that values were finite when they were computed (musubi-tuner replaces NaN by 0), and that no bit has flipped "
        "since: the files carry no checksums",
    )

    def __init__(self, folder: Path, family_name: str, samples: Iterable[str]) -> None:
        self.folder = Path(folder)
        if family_name not in ARCHITECTURES:
            raise CacheError(
                f"files of musubi-tuner cannot be imported for {family_name}; they can for {', '.join(ARCHITECTURES)}"
            )
        self._architecture = ARCHITECTURES[family_name]
        # Latents of target and controls are in one file, embeddings and mask come from one.
        self._last: tuple[Path, int, tuple[dict[str, torch.Tensor], dict[str, Any]]] | None = None
        self._stems = Counter(Path(name).name for name in samples)
        if next(self.folder.glob(f"*_{self._architecture}*.safetensors"), None) is None:
            raise CacheError(
                f"{folder} has no *_{self._architecture}.safetensors; expected the cache_directory of musubi-tuner"
            )

    def read(self, sample: Sample, artifact: str, recipe: Recipe, expected: Expected) -> Foreign:
        """The tensor for this artifact of this sample; raises as `ForeignCache.read` does."""
        stem = sample.target.stem
        if artifact.startswith("empty_"):
            raise RecordMissingError("musubi-tuner caches no empty prompt")
        if self._stems[Path(sample.name).name] > 1:
            raise CacheError(f"several samples are called {stem!r}: musubi-tuner gives them one file")
        if artifact in LATENTS:
            width, height = picture_size(sample.target)
            return self._latents(sample, artifact, f"{stem}_{width:04d}x{height:04d}_{self._architecture}", expected)
        return self._text(sample, artifact, f"{stem}_{self._architecture}_te")

    def _latents(self, sample: Sample, artifact: str, stem: str, expected: Expected) -> Foreign:
        pictures = [sample.target] if artifact == "image_latents" else list(sample.controls)
        tensors, _ = self._open(stem, pictures)
        if artifact == "image_latents":
            found = [tensor for name, tensor in tensors.items() if _TARGET.fullmatch(name)]
            grids = expected.grids[:1]
        else:
            numbered = {int(match[1]): tensors[name] for name in tensors if (match := _CONTROL.fullmatch(name))}
            found = [numbered[number] for number in sorted(numbered)]
            grids = expected.grids[1:]
        if len(found) != len(grids):
            raise CacheError(f"it holds {len(found)} of the {len(grids)} {artifact.replace('_', ' ')} of the sample")
        packed = [_packed(tensor, grid) for tensor, grid in zip(found, grids, strict=True)]
        return Foreign(torch.cat(packed), f"{stem}.safetensors", ("packed from (C, F, H, W)",))

    def _text(self, sample: Sample, artifact: str, stem: str) -> Foreign:
        tensors, metadata = self._open(stem, list(sample.controls))
        if metadata.get("caption1") != sample.prompt:
            raise CacheError("the caption has changed since it was cached")
        found = [tensor for name, tensor in tensors.items() if _TEXT.fullmatch(name)]
        if artifact not in ("prompt_embeds", "prompt_embeds_mask") or len(found) != 1 or found[0].ndim != 2:
            raise CacheError(f"it holds no varlen_vl_embed for {artifact}, but {', '.join(tensors) or 'nothing'}")
        if artifact == "prompt_embeds":
            return Foreign(found[0], f"{stem}.safetensors")
        return Foreign(torch.ones(found[0].shape[0], dtype=torch.bool), f"{stem}.safetensors", ("mask of all tokens",))

    def _open(self, stem: str, pictures: Iterable[Path]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors and metadata of a file that is no older than the pictures it was made from."""
        path = self.folder / f"{stem}.safetensors"
        try:
            written = path.stat().st_mtime_ns
            if self._last is None or self._last[:2] != (path, written):
                self._last = (path, written, _read(path))
        except FileNotFoundError as error:
            raise RecordMissingError(f"there is no {path.name}") from error
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordCorruptError(f"it is torn or damaged ({error})") from error
        newer = [picture for picture in pictures if status_of(picture)[1] > written]
        if newer:
            raise CacheError(
                f"{newer[0]} is newer than it, and may be another picture than the one that was cached (where copying "
                "the data set made it newer, touch the cache's files)"
            )
        return self._last[2]


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a file; read whole, since a file that shrinks while it is mapped kills the process."""
    content = path.read_bytes()
    tensors: dict[str, torch.Tensor] = load(content)
    header = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")])
    return tensors, header.get("__metadata__") or {}


def _packed(latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Packed latents `(height * width, 4C)` of `(C, 1, 2 * height, 2 * width)`, by diffusers' own method."""
    from diffusers import QwenImageEditPlusPipeline

    if latents.ndim != 4 or latents.shape[1] != 1 or tuple(latents.shape[2:]) != (2 * grid[0], 2 * grid[1]):
        raise CacheError(
            f"its latents have shape {list(latents.shape)}; expected [C, 1, {2 * grid[0]}, {2 * grid[1]}] at this "
            "resolution: it was cached at another size"
        )
    channels, _, height, width = latents.shape
    packed: torch.Tensor = QwenImageEditPlusPipeline._pack_latents(latents[:, 0], 1, channels, height, width)
    return packed[0].contiguous()
