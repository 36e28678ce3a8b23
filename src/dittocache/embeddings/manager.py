"""The spec's `EmbeddingCacheManager`: embeddings of a data set in a folder, by the hashes of what they were made from.

The layout, the names and the hashes are those of qflux, whose folders it reads and, with `format="pt"`, writes:

    {cache_dir}/{embedding_key}/{hash}.safetensors      or .pt
    {cache_dir}/metadata/{main_hash}.json               {"version": "2.0", embedding_key: hash}

For new work prefer the store (`dittocache cache run`): its keys hold everything that determines an embedding, while the
hashes here do not know encoder, weights, resolution or template.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from dittocache.embeddings.foreign.embedding_files import (
    FORMATS,
    FileFormat,
    check_embedding_key,
    read_embedding,
    write_embedding,
)
from dittocache.embeddings.foreign.hashing import SourceHashes, file_hashes
from dittocache.embeddings.foreign.hashing import hash_string_md5 as _hash_string_md5
from dittocache.embeddings.foreign.layout_clearing import layout_files, remove_files
from dittocache.embeddings.foreign.metadata import (
    Metadata,
    metadata_files,
    metadata_path,
    read_metadata,
    write_metadata,
)
from dittocache.embeddings.foreign.pt_files import PtValue
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError

EMPTY = "empty_"  # begins the keys of the empty prompt's embeddings
MASK = "_mask"  # ends the keys of masks


class EmbeddingCacheManager:
    """Saves and loads the embeddings of samples in the spec's folder layout.

    Args:
        cache_dir: the folder; it is created by the first save.
        format: `safetensors` (with a checksum that is verified when reading) or `pt` (what qflux reads). Both are read.
        float_dtype: data type in which floating tensors are stored; None keeps their own. Masks and ids keep theirs
            always.

    Files are written atomically and never overwritten. Where a hash is already taken by another tensor (the spec's
    example maps `prompt_embeds` to `prompt_hash`, but what Qwen-Image-Edit makes of a prompt depends on the control
    picture too) the new one gets a name of its own, which the sample's metadata holds: both samples load what is
    theirs. Mapping to `control_prompt_hash` says it from the start.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str],
        format: FileFormat = "safetensors",
        float_dtype: torch.dtype | None = None,
    ) -> None:
        if format not in FORMATS:
            raise CacheError(f"format {format!r} is unknown; expected one of {', '.join(FORMATS)}")
        if float_dtype is not None and not float_dtype.is_floating_point:
            raise CacheError(f"float_dtype {float_dtype} is no floating type; expected torch.float16 or alike")
        self.cache_root = Path(cache_dir)
        self.format: FileFormat = format
        self.float_dtype = float_dtype
        self._sources = SourceHashes()

    def save_cache_embedding(
        self,
        cache_embeddings: Mapping[str, torch.Tensor],
        hash_maps: Mapping[str, str],
        file_hashes: Mapping[str, Any],
    ) -> dict[str, str]:
        """Store a sample's embeddings, and then the metadata that names them.

        Args:
            cache_embeddings: embedding key -> tensor without a batch axis.
            hash_maps: embedding key -> the name of the hash that its file is called by.
            file_hashes: name -> hash, by `get_file_hashes`; `main_hash` names the sample.

        Returns the name of each file without its ending. Interrupted, it leaves whole files and no metadata: the sample
        counts as not cached. Raises CacheError where keys, hashes or tensors do not fit, StoreUnavailableError where
        the folder cannot be written.
        """
        hashes = {name: _single(value) for name, value in file_hashes.items()}
        _check_maps(cache_embeddings, hash_maps, hashes)
        tensors = {key: self._as_stored(key, value) for key, value in cache_embeddings.items()}
        stems = {
            key: write_embedding(self.cache_root, key, hashes[hash_maps[key]], tensor, self.format)
            for key, tensor in tensors.items()
        }
        write_metadata(self.cache_root, hashes["main_hash"], stems)
        return stems

    def load_cache(
        self,
        data: MutableMapping[str, Any],
        replace_empty_embeddings: bool = False,
        prompt_empty_drop_keys: Sequence[str] | None = None,
        on_damage: Literal["raise", "recompute"] = "raise",
    ) -> MutableMapping[str, Any]:
        """Put the embeddings of the sample `data` into it and set `data["cached"]`.

        Args:
            data: a sample with `file_hashes` (`get_file_hashes`); no source file is read here.
            replace_empty_embeddings: the prompt was dropped: `prompt_embeds` and whatever else has an empty twin come
                from the twin, masks included.
            prompt_empty_drop_keys: those twins, as `["empty_prompt_embeds", "empty_prompt_embeds_mask"]`; None takes
                all that the sample has. The mask of a key that is named here is replaced with it.
            on_damage: `recompute` counts a sample with a damaged file as not cached; `raise` names the file.

        A sample that is not cached, or only in part, is left as it was, with `data["cached"]` False: then its
        embeddings have to be computed. Empty twins themselves are not loaded. Raises CacheError where
        `file_hashes` is missing or a drop key names nothing that is cached, RecordCorruptError.
        """
        if "main_hash" not in data.get("file_hashes", {}):
            raise CacheError(
                "the sample has no file_hashes; set data['file_hashes'] = manager.get_file_hashes(data) once"
            )
        try:
            metadata = read_metadata(metadata_path(self.cache_root, _single(data["file_hashes"]["main_hash"])))
            loaded = self._load(metadata, replace_empty_embeddings, prompt_empty_drop_keys)
        except RecordMissingError:
            loaded = None
        except RecordCorruptError:
            if on_damage == "raise":
                raise
            loaded = None
        data.update(loaded or {})
        data["cached"] = loaded is not None
        return data

    @staticmethod
    def exist(cache_dir: str | os.PathLike[str]) -> bool:
        """Whether the folder holds metadata of at least one sample."""
        return any(True for _ in metadata_files(Path(cache_dir)))

    def get_hash(self, file_or_image: str | os.PathLike[str] | Image.Image, prompt: str = "") -> str:
        """md5 of a file's bytes, followed by md5 of the prompt where one is given.

        A file is read again only when its size or times have changed. An opened picture's hash is md5 of its mode, size
        and pixels, not qflux's perceptual hash, under which pictures that look alike share one embedding. Raises
        DataError when the file cannot be read.
        """
        return self._sources.get_hash(file_or_image, prompt)

    @staticmethod
    def hash_string_md5(text: str) -> str:
        """md5 of the text's UTF-8 bytes, 32 hex digits."""
        return _hash_string_md5(text)

    def get_file_hashes(self, data: Mapping[str, Any]) -> dict[str, str]:
        """All hashes of a sample with any of `image`, `control`, `controls` and `prompt`.

        `image_hash`, `control_hash`, `prompt_hash`, `empty_prompt_hash`, `control_prompt_hash`,
        `control_empty_prompt_hash`, `control_1_hash` and so on for `controls`, `controls_sum_hash`, `main_hash`.
        Raises DataError when a file cannot be read.
        """
        return file_hashes(data, self._sources)

    def clear_cache(self, dry_run: bool = False) -> list[Path]:
        """Remove what belongs to the layout (embeddings, metadata, left-over temporary files) and nothing else.

        Returns the files that were removed, or with `dry_run` would be. Raises StoreUnavailableError.
        """
        files = layout_files(self.cache_root)
        if not dry_run:
            remove_files(self.cache_root, files)
        return files

    def _as_stored(self, key: str, value: Any) -> torch.Tensor:
        check_embedding_key(key)
        if not isinstance(value, torch.Tensor):
            raise CacheError(f"embedding {key!r} is a {type(value).__name__}; expected a tensor (img_shapes: int32)")
        if self.float_dtype is None or not value.is_floating_point():
            return value
        stored = value.detach().to(self.float_dtype)
        if bool(torch.isinf(stored).sum() != torch.isinf(value).sum()):
            raise CacheError(f"embedding {key!r} has values too large for {self.float_dtype}; use float_dtype=None")
        return stored

    def _load(self, metadata: Metadata, replace: bool, drop_keys: Sequence[str] | None) -> dict[str, PtValue]:
        """The sample's embeddings under the keys that training wants."""
        sources = {key: key for key in metadata.stems if not key.startswith(EMPTY)}
        if replace:
            twins = _empty_twins(metadata.stems, drop_keys)
            sources |= {twin.removeprefix(EMPTY): twin for twin in twins}
        loaded = {
            key: read_embedding(self.cache_root, source, metadata.stems[source]) for key, source in sources.items()
        }
        if metadata.img_shapes is not None:
            loaded["img_shapes"] = metadata.img_shapes
        return loaded


def check_cache_exists(cache_dir: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a cache in the spec's layout: metadata of at least one sample."""
    return EmbeddingCacheManager.exist(cache_dir)


def _empty_twins(stems: Mapping[str, str], drop_keys: Sequence[str] | None) -> list[str]:
    """The keys of the empty prompt that replace those of the prompt."""
    present = [key for key in stems if key.startswith(EMPTY)]
    if not present:
        raise CacheError(
            "the prompt was dropped but no embeddings of the empty prompt are cached; cache empty_prompt_embeds, "
            "or set replace_empty_embeddings=False"
        )
    if drop_keys is None:
        return present
    # A family without masks has none to replace; any other name that is not there is a mistake.
    wanted = [
        key for key in drop_keys if key in stems or not (key.endswith(MASK) and key.removeprefix(EMPTY) not in stems)
    ]
    unknown = [key for key in wanted if key not in present]
    if unknown or not wanted:
        found = ", ".join(unknown) or "nothing"
        raise CacheError(f"prompt_empty_drop_keys names {found}; the sample has {', '.join(present)}")
    masks = [f"{key}{MASK}" for key in wanted]
    return list(dict.fromkeys([*wanted, *(mask for mask in masks if mask in present)]))


def _check_maps(embeddings: Mapping[str, Any], hash_maps: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    if set(hash_maps) != set(embeddings):
        differing = sorted(set(hash_maps) ^ set(embeddings))
        raise CacheError(
            f"hash_maps and cache_embeddings differ in {', '.join(differing)}; both must have the same keys"
        )
    absent = sorted({name for name in (*hash_maps.values(), "main_hash") if not hashes.get(name)})
    if absent:
        raise CacheError(f"file_hashes has no {', '.join(absent)}; it has {', '.join(sorted(hashes))}")


def _single(value: Any) -> str:
    """A hash, also where a data loader made a batch of one of it."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise CacheError(f"a hash is {value!r}; expected one string for one sample")
    return value
