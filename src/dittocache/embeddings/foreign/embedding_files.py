"""Files of the spec's layout, `{root}/{embedding_key}/{hash}.EXT`: written once, never overwritten, verified when read.

Two endings: `.safetensors`, a record as this package's store has it, which proves itself; and `.pt`, as qflux writes
and reads it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Literal

import torch

from dittocache.embeddings.foreign.pt_files import PtValue, pt_bytes, read_pt
from dittocache.embeddings.recipe import Recipe, recipe_key
from dittocache.embeddings.store import writer_id
from dittocache.embeddings.store.durable import replace_file, sync_folder
from dittocache.embeddings.store.record import pack, unpack
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError

FileFormat = Literal["safetensors", "pt"]
FORMATS: tuple[FileFormat, ...] = ("safetensors", "pt")  # the order in which a reader looks for them
LONGEST_STEM = 160  # five md5; leaves room for the names of temporary files

_KEY = re.compile(r"[A-Za-z0-9_]{1,100}")
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,239}")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def check_embedding_key(key: str) -> str:
    """The key, which names a folder; raises CacheError where it could not."""
    if not _KEY.fullmatch(key) or key == "metadata":
        raise CacheError(f"{key!r} is no embedding key; expected letters, digits and _, as in prompt_embeds")
    return key


def stem_of(hash_value: str) -> str:
    """The file name that stands for a hash: itself, or its md5 where it is too long for file systems."""
    stem = hash_value if len(hash_value) <= LONGEST_STEM else hashlib.md5(hash_value.encode()).hexdigest()
    return check_stem(stem)


def check_stem(stem: str) -> str:
    """A file name out of a metadata file; raises CacheError when it could lead out of its folder."""
    if not _STEM.fullmatch(stem):
        raise CacheError(f"{stem!r} is no hash that can name a file; expected letters, digits, - and _")
    return stem


def find_embedding(root: Path, key: str, stem: str) -> Path | None:
    """The file of an embedding, whichever its format; None when there is none."""
    for suffix in FORMATS:
        path = root / check_embedding_key(key) / f"{check_stem(stem)}.{suffix}"
        if path.is_file():
            return path
    return None


def read_embedding(root: Path, key: str, stem: str) -> PtValue:
    """The embedding, verified.

    Raises RecordMissingError when there is no file, RecordCorruptError when it is torn or damaged, CacheError when it
    is a `.pt` file with more than tensors in it.
    """
    path = find_embedding(root, key, stem)
    if path is None:
        raise RecordMissingError(f"there is no {root / key / stem}.safetensors nor .pt; cache the data set again")
    if path.suffix == ".pt":
        return read_pt(path)
    with unavailable(f"{path} cannot be read"):
        content = bytearray(path.read_bytes())
    try:
        return unpack(content, recipe_key(_recipe(key, stem)))
    except RecordCorruptError as error:
        raise RecordCorruptError(f"{path}: {error}; remove it and cache again") from error


def write_embedding(root: Path, key: str, hash_value: str, tensor: torch.Tensor, form: FileFormat) -> str:
    """Store an embedding durably and return the name of its file, without the ending.

    The name is the hash, unless a file of that name holds another tensor: then it is the hash followed by a digest of
    the tensor, and both stay. A file that is there and equal stays as it is; a damaged one is replaced. Raises
    StoreUnavailableError.
    """
    tensor = tensor.detach().to("cpu").contiguous()
    hash_stem = stem_of(hash_value)
    for digest in (None, _content_digest):
        stem = hash_stem if digest is None else f"{hash_stem}-{digest(tensor)}"
        content = _file_content(key, stem, tensor, form)
        target = root / check_embedding_key(key) / f"{stem}.{form}"
        with unavailable(f"{target} cannot be written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    if same_value(read_embedding(root, key, stem), tensor):
                        return stem
                    break  # somebody else's: the next name
                except RecordCorruptError:
                    damaged = find_embedding(root, key, stem)
                    if damaged is not None and damaged != target:
                        damaged.unlink(missing_ok=True)
                    replace_file(target, content)
                    return stem
                except RecordMissingError:
                    if publish_new(target, content):
                        return stem
    raise CacheError(f"{target} holds a tensor that does not belong to its name; remove it and cache again")


def publish_new(path: Path, content: bytes) -> bool:
    """Make `path` hold `content`, atomically and durably, unless there is such a file already: then False.

    Of any number of writers at once, one succeeds. Raises OSError.
    """
    complete = path.with_name(f".{path.stem}.{writer_id.current()}.{secrets.token_hex(4)}.tmp")
    replace_file(complete, content)
    try:
        os.link(complete, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():  # file systems without hard links: two writers at the same moment are not told apart
            return False
        os.replace(complete, path)
    finally:
        complete.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def same_value(one: PtValue, other: PtValue) -> bool:
    """Whether two values are the same in structure, dtypes, shapes and every bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(_bytes(one), _bytes(other))  # NaN included, and 0.0 is not -0.0


def _file_content(key: str, stem: str, tensor: torch.Tensor, form: FileFormat) -> bytes:
    if form == "pt":
        return pt_bytes(tensor)
    recipe = _recipe(key, stem)
    return pack(recipe_key(recipe), tensor, recipe)


def _recipe(key: str, stem: str) -> Recipe:
    """What a record of this layout is made from, as far as the layout says: so a renamed file does not pass."""
    return {"schema": 1, "artifact": key, "named_by": stem}


def _content_digest(tensor: torch.Tensor) -> str:
    hasher = hashlib.md5(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), usedforsecurity=False)
    hasher.update(_bytes(tensor).numpy().data)
    return hasher.hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
