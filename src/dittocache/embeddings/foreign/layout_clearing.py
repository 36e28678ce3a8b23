"""Which files of a folder belong to the spec's layout, for removing them and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dittocache.embeddings.foreign.embedding_files import FORMATS
from dittocache.embeddings.foreign.metadata import FOLDER, metadata_files, read_metadata
from dittocache.embeddings.store import writer_id
from dittocache.embeddings.store.durable import TEMPORARY_PATTERN, writer_of
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import CacheError

SPEC_KEYS = (
    "image_latents",
    "control_latents",
    "prompt_embeds",
    "prompt_embeds_mask",
    "pooled_prompt_embeds",
    "empty_prompt_embeds",
    "empty_prompt_embeds_mask",
    "empty_pooled_prompt_embeds",
    "img_shapes",
)


def layout_files(root: Path) -> list[Path]:
    """The layout's files below `root`: embeddings, temporary files of dead writers, and the metadata last.

    Folders count that the spec or a metadata file names; links and files with other endings do not.
    """
    metadata = sorted(metadata_files(root))
    keys = set(SPEC_KEYS)
    for path in metadata:
        try:
            keys |= set(read_metadata(path).stems)
        except CacheError:
            continue  # a damaged file goes like the others; it only cannot name folders
    found: list[Path] = []
    with unavailable(f"{root} cannot be read"):
        for folder in [root / key for key in sorted(keys)] + [root / FOLDER]:
            if folder.is_dir() and not folder.is_symlink():
                if folder.name != FOLDER:
                    found += sorted(path for form in FORMATS for path in folder.glob(f"[!.]*.{form}") if _is_file(path))
                found += sorted(path for path in folder.glob(TEMPORARY_PATTERN) if _is_left_over(path))
    # While a sample's metadata is there, its files can be found: an interrupted clearing goes on.
    return [*found, *metadata]


def remove_files(root: Path, files: Sequence[Path]) -> None:
    """Remove files and the folders that they leave empty, `root` excepted; raises StoreUnavailableError."""
    with unavailable(f"{root} cannot be cleared"):
        for path in files:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in files}:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_left_over(path: Path) -> bool:
    return _is_file(path) and path.name.count(".") >= 4 and writer_id.is_dead(writer_of(path))
