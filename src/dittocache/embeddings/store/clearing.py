"""Remove a whole store, and nothing that is not of its layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dittocache.embeddings.store.layout import LAYOUT_NAME
from dittocache.embeddings.store.maintenance import maintenance
from dittocache.embeddings.store.roots import Root, roots
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import CacheError

_KEY = "[0-9a-f]{32}"
# The index goes before the packs, so that no reader believes it; the layout last, so that a rest is still a store.
_LAYOUT = tuple(
    (folder, re.compile(name))
    for folder, name in (
        ("objects/[0-9a-f][0-9a-f]", rf"{_KEY}\.safetensors|\..*\.tmp"),
        ("packs", r"index|\..*\.tmp"),
        ("packs", rf"{_KEY}\.safetensors"),
        ("packs/dropped", rf"{_KEY}\.{_KEY}"),
        ("trash", rf"{_KEY}\.safetensors"),
        ("quarantine", rf"{_KEY}\.\d+\.safetensors|\..*\.tmp"),
        ("roots", rf"{_KEY}\.root|\..*\.tmp"),
        ("leases", r"\.clock\..+|.+\.\d+"),
        (".", r"content-index\.json|\..*\.tmp"),
        (".", rf"{re.escape(LAYOUT_NAME)}|maintenance\.lock"),
    )
)
_FOLDERS = (
    "objects/[0-9a-f][0-9a-f]",
    "objects",
    "packs/dropped",
    "packs",
    "trash",
    "quarantine",
    "roots",
    "leases",
    ".",
)


@dataclass(frozen=True)
class ClearPlan:
    """What clearing removes.

    Attributes:
        files: path -> bytes, in the order in which they go.
        foreign: files and folders below the store that are not of its layout, and stay.
        living_roots: runs that use the records.
    """

    files: dict[Path, int]
    foreign: list[Path]
    living_roots: list[Root]

    def describe(self) -> str:
        """The plan in a few lines for a terminal."""
        lines = [f"{len(self.files)} files ({sum(self.files.values()) / 1e6:.1f} MB)"]
        lines += [f"run {root.manifest} uses {len(root)} records of this store" for root in self.living_roots]
        if self.foreign:
            lines.append(f"{len(self.foreign)} files that are not of the store stay, for example {self.foreign[0]}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "files": len(self.files),
            "bytes": sum(self.files.values()),
            "foreign": [str(path) for path in self.foreign],
            "living_roots": [root.as_dict() for root in self.living_roots],
        }


def plan_clear(store: Store) -> ClearPlan:
    """Find what belongs to the store; nothing is changed."""
    with unavailable(f"the store {store.root} cannot be read"):
        files: dict[Path, int] = {}
        for path in _own_files(store.root):
            with suppress(FileNotFoundError):
                files[path] = path.lstat().st_size
        foreign = sorted(path for path in store.root.rglob("*") if not path.is_dir() and path not in files)
        return ClearPlan(files, foreign, _living(store))


def clear(store: Store) -> ClearPlan:
    """Remove everything that belongs to the store, and the folders that are empty then; returns what went.

    Raises CacheError while another process packs or removes records; StoreUnavailableError.
    """
    if not store.root.is_dir():
        return ClearPlan({}, [], [])
    with unavailable(f"the store {store.root} cannot be cleared"), maintenance(store.local):
        plan = plan_clear(store)
        for path in plan.files:
            path.unlink(missing_ok=True)
        for pattern in _FOLDERS:
            for folder in [store.root] if pattern == "." else store.root.glob(pattern):
                with suppress(OSError):  # what is not empty stays
                    folder.rmdir()
    return plan


def _own_files(root: Path) -> Iterator[Path]:
    for pattern, name in _LAYOUT:
        for folder in [root] if pattern == "." else root.glob(pattern):
            if folder.is_dir() and not folder.is_symlink():
                yield from (path for path in sorted(folder.iterdir()) if name.fullmatch(path.name) and _is_file(path))


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _living(store: Store) -> list[Root]:
    try:
        return [root for root in roots(store) if not root.is_dead()]
    except CacheError:
        return []  # a damaged root must not keep a store from being cleared
