"""Folders that qflux cached into (the spec's layout): found by the hashes of a sample's files.

qflux names prompt embeddings by the prompt alone. Where what the encoder makes of a prompt depends on the control
pictures, samples with the same prompt and other controls overwrite each other's file: whose it is cannot be told, and
such a file is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch

from dittocache.data.sample import Sample
from dittocache.embeddings.foreign.embedding_files import find_embedding, read_embedding, stem_of
from dittocache.embeddings.foreign.expectation import Expected
from dittocache.embeddings.foreign.hashing import SourceHashes, file_hashes
from dittocache.embeddings.foreign.metadata import Metadata, metadata_files, metadata_path, read_metadata
from dittocache.embeddings.foreign.source import Foreign, as_mask, without_padding
from dittocache.embeddings.recipe import Recipe
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError

_LATENT_HASHES = {"image_latents": ("image_hash", "main_hash"), "control_latents": ("controls_sum_hash", "main_hash")}


class QfluxCache:
    """A qflux folder: `{embedding_key}/{hash}.pt` and `metadata/{main_hash}.json`. A `ForeignCache`."""

    tool = "qflux"
    verified: Sequence[str] = (
        "pictures and prompts, by their hashes",
        "token counts against the resolution, widths against the model's configuration, masks, finite values",
    )
    unverified: Sequence[str] = (
        "the weights of the encoders: nothing in the files says which model made them",
        "the prompt template, and the size at which control pictures were shown to the text encoder",
        "how pictures were resized and cropped",
        "the data type that the encoders computed in: qflux casts everything to float16",
    )

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._sources = SourceHashes()
        self._last: tuple[str, tuple[str, str], tuple[Foreign, Foreign]] | None = None
        if next(iter(metadata_files(self.folder)), None) is None:
            raise CacheError(f"{folder} has no metadata/*.json; expected the cache_dir of a qflux run")

    def read(self, sample: Sample, artifact: str, recipe: Recipe, expected: Expected) -> Foreign:
        """The tensor for this artifact of this sample; raises as `ForeignCache.read` does."""
        hashes = sample_hashes(sample, self._sources)
        metadata = self._metadata(hashes["main_hash"])
        stem = metadata.stems.get(artifact)
        if stem is None:
            raise RecordMissingError(f"the sample was cached without {artifact}")
        self._check_owner(sample, artifact, stem, recipe, hashes)
        masked = artifact.endswith("_mask")
        partner = artifact.removesuffix("_mask") if masked else f"{artifact}_mask"
        if partner not in metadata.stems:
            tensor, file = self._tensor(artifact, stem)
            return Foreign(tensor, file)
        embeds, mask = (partner, artifact) if masked else (artifact, partner)
        files = metadata.stems[embeds], metadata.stems[mask]
        # Embeddings and mask prove each other and are wanted one after the other.
        if self._last is None or self._last[:2] != (embeds, files):
            self._last = (embeds, files, self._pair(embeds, mask, *files))
        return self._last[2][masked]

    def _metadata(self, main_hash: str) -> Metadata:
        path = metadata_path(self.folder, main_hash)
        if not path.is_file():
            raise RecordMissingError("not cached, or a picture or the prompt has changed since")
        return read_metadata(path)

    def _check_owner(self, sample: Sample, artifact: str, stem: str, recipe: Recipe, hashes: Mapping[str, str]) -> None:
        """Raise CacheError where the file may be another sample's."""
        if artifact in _LATENT_HASHES:
            names = _LATENT_HASHES[artifact]
            if stem.split("-")[0] not in {stem_of(hashes[name]) for name in names if name in hashes}:
                raise CacheError("a further control picture was added, removed or changed since it was cached")
            return
        depends = any(one["role"] == "control" for one in recipe["inputs"])
        controls = self._controls.get((artifact, stem), set())
        if depends and len(controls) > 1:
            raise CacheError(
                f"the prompt is shared by samples with {len(controls)} different control pictures, which overwrote "
                "each other's embedding: whose this is cannot be told"
            )
        if depends and len(sample.controls) > 1:
            known = self._metadata(hashes["main_hash"]).stems.get("control_latents", "").split("-")[0]
            if known != stem_of(hashes["controls_sum_hash"]):
                raise CacheError("a further control picture was added, removed or changed since it was cached")

    @cached_property
    def _controls(self) -> dict[tuple[str, str], set[str]]:
        """For each file the control pictures of the samples that use it."""
        found: dict[tuple[str, str], set[str]] = {}
        for path in metadata_files(self.folder):
            try:
                stems = read_metadata(path).stems
            except CacheError:
                continue  # it is refused when its own sample's turn comes
            for artifact, stem in stems.items():
                found.setdefault((artifact, stem), set()).add(stems.get("control_latents", path.stem))
        return found

    def _pair(self, embeds_key: str, mask_key: str, embeds_stem: str, mask_stem: str) -> tuple[Foreign, Foreign]:
        """Embeddings and their mask without padding."""
        embeds, embeds_file = self._tensor(embeds_key, embeds_stem)
        mask, mask_file = self._tensor(mask_key, mask_stem)
        try:
            short_embeds, short_mask = without_padding(embeds, as_mask(mask))
        except ValueError as error:
            raise RecordCorruptError(f"{embeds_file}: {error}") from error
        padding = len(mask) - len(short_mask)
        notes = (f"{padding} tokens of padding removed",) if padding else ()
        cast = (
            ()
            if mask.dtype == torch.bool
            else (f"mask of {str(mask.dtype).removeprefix('torch.')} turned into booleans",)
        )
        return Foreign(short_embeds, embeds_file, notes), Foreign(short_mask, mask_file, (*notes, *cast))

    def _tensor(self, key: str, stem: str) -> tuple[torch.Tensor, str]:
        path = find_embedding(self.folder, key, stem)
        if path is None:
            raise RecordMissingError(f"its file {key}/{stem}.pt is gone")
        value = read_embedding(self.folder, key, stem)
        if not isinstance(value, torch.Tensor):
            raise CacheError(f"it holds a {type(value).__name__}; expected one tensor")
        return value, str(path.relative_to(self.folder))


def sample_hashes(sample: Sample, sources: SourceHashes) -> dict[str, str]:
    """A sample's hashes: the first control is qflux's `control`, the others its `controls`."""
    data: dict[str, object] = {"image": sample.target, "prompt": sample.prompt}
    if sample.controls:
        data["control"] = sample.controls[0]
    if len(sample.controls) > 1:
        data["controls"] = list(sample.controls[1:])
    return file_hashes(data, sources)
