"""`{root}/metadata/{main_hash}.json` of the spec's layout: which file holds each embedding of a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittocache.embeddings.foreign.embedding_files import check_embedding_key, check_stem, stem_of
from dittocache.embeddings.store.durable import replace_file
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError

VERSION = "2.0"
FOLDER = "metadata"


@dataclass(frozen=True)
class Metadata:
    """One sample's files.

    Attributes:
        stems: embedding key -> name of its file without the ending: a hash.
        img_shapes: the shapes, where the file holds them itself (qflux may write them so).
    """

    stems: Mapping[str, str]
    img_shapes: torch.Tensor | None = None


def metadata_path(root: Path, main_hash: str) -> Path:
    """Where a sample's metadata is."""
    return root / FOLDER / f"{stem_of(main_hash)}.json"


def metadata_files(root: Path) -> Iterator[Path]:
    """All metadata files below a folder, in no particular order."""
    with unavailable(f"{root / FOLDER} cannot be read"):
        if (root / FOLDER).is_dir():
            yield from (path for path in (root / FOLDER).glob("*.json") if not path.name.startswith("."))


def write_metadata(root: Path, main_hash: str, stems: Mapping[str, str]) -> None:
    """Write a sample's metadata, atomically and durably; raises StoreUnavailableError."""
    path = metadata_path(root, main_hash)
    with unavailable(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps({"version": VERSION, **stems}, indent=2) + "\n").encode())


def read_metadata(path: Path) -> Metadata:
    """A sample's metadata.

    Raises RecordMissingError when there is no such file, RecordCorruptError when it is damaged, CacheError when it is
    of another version or a name in it could lead out of the folder.
    """
    content = _content(path)
    try:
        fields: Any = json.loads(content)
        version = fields.pop("version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordCorruptError(f"{path} is damaged ({error!r}); remove it and cache again") from error
    if version != VERSION:
        raise CacheError(f"{path} has version {version!r}; expected {VERSION!r}: cache the data set again")
    shapes = fields.pop("img_shapes") if isinstance(fields.get("img_shapes"), list) else None
    try:
        stems = {check_embedding_key(str(key)): check_stem(str(stem)) for key, stem in fields.items()}
        return Metadata(stems, None if shapes is None else torch.tensor(shapes, dtype=torch.int32))
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecordCorruptError(f"{path} is damaged ({error}); remove it and cache again") from error
    except CacheError as error:
        raise CacheError(f"{path}: {error}; remove it and cache again") from error


def _content(path: Path) -> bytes:
    with unavailable(f"{path} cannot be read"):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise RecordMissingError(f"{path} does not exist: its sample is not cached") from error
