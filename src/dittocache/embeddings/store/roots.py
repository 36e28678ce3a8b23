"""Roots: which records are in use, by which run; gc removes nothing that a living root names.

A root is one file in `ROOT/roots` for one manifest: a line of JSON, then the keys, 16 bytes each, ascending. A run
registers its keys *before* it looks which records are there: then gc, which looks at the roots once more after it has
taken records out and before it removes them, either sees the root or the run sees what is missing.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from blake3 import blake3
from xxhash import xxh3_64_hexdigest

from dittocache.embeddings.store.durable import replace_file
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import CacheError

VERSION = 1
SUFFIX = ".root"
_KEY_BYTES = 16


@dataclass(frozen=True)
class Root:
    """A run that uses records.

    Attributes:
        id: name of the root's file.
        manifest: absolute path of the run's manifest on `host`.
        machine: identity of that machine, which survives a restart.
        mount: where the manifest's file system was mounted.
        saved: the manifest was written when this was registered last.
        registered: seconds since the epoch.
        keys: the records in use; `length` of them.
    """

    id: str
    manifest: Path
    host: str
    machine: str
    mount: Path
    saved: bool
    registered: float
    keys: bytes

    def __len__(self) -> int:
        return len(self.keys) // _KEY_BYTES

    @property
    def is_here(self) -> bool:
        """Whether its manifest belongs to this machine, on a file system that is mounted now."""
        return self.machine == machine_identity() and _mount_of(self.manifest) == self.mount

    def is_dead(self, grace_seconds: float = 0.0) -> bool:
        """Whether the run is gone: its manifest was on this machine and does not exist any more.

        A run that has not written its manifest yet lives as long as its folder exists, and for `grace_seconds` in any
        case. What is on another machine, or on a file system that is not mounted, lives until it is forgotten.
        """
        if not self.is_here or self.manifest.exists() or time.time() - self.registered < grace_seconds:
            return False
        return self.saved or not self.manifest.parent.exists()

    def as_dict(self) -> dict[str, Any]:
        """The root as JSON values, without its keys."""
        return {
            "id": self.id,
            "manifest": str(self.manifest),
            "host": self.host,
            "records": len(self),
            "registered": self.registered,
            "is_here": self.is_here,
        }


def register(store: Store, manifest_path: Path, keys: Iterable[str], *, saved: bool = False) -> Root:
    """Say that the run with this manifest uses these records, from now on and durably.

    Args:
        keys: of all records that the run needs, those that are still to be encoded included.
        saved: the manifest is written and names exactly these keys. Before that, what was registered for the same
            manifest earlier stays registered as well: the old manifest may be in use.

    Look which records are there only after this returned. Raises StoreUnavailableError when the store cannot be
    written.
    """
    manifest = manifest_path.absolute()
    identity = str(blake3(f"{machine_identity()}\0{manifest}".encode()).hexdigest(length=_KEY_BYTES))
    found = {bytes.fromhex(key) for key in keys}
    if not saved and (earlier := _load(_folder(store) / f"{identity}{SUFFIX}")) is not None:
        found |= set(split(earlier.keys))
    root = Root(
        id=identity,
        manifest=manifest,
        host=platform.node(),
        machine=machine_identity(),
        mount=_mount_of(manifest),
        saved=saved,
        registered=time.time(),
        keys=b"".join(sorted(found)),
    )
    with unavailable(f"the run {manifest} cannot be registered in {_folder(store)}"):
        _folder(store).mkdir(parents=True, exist_ok=True)
        replace_file(_folder(store) / f"{identity}{SUFFIX}", _to_bytes(root))
    return root


def forget(store: Store, root_id: str) -> None:
    """Remove a root, by its id or the path of its manifest; raises CacheError when there is none."""
    for root in roots(store):
        if root_id in (root.id, str(root.manifest)):
            with unavailable(f"the root {root_id} cannot be removed"):
                (_folder(store) / f"{root.id}{SUFFIX}").unlink(missing_ok=True)
            return
    raise CacheError(f"the store {store.root} has no root {root_id!r}; `dittocache cache gc` lists them")


def roots(store: Store) -> list[Root]:
    """All roots of a store; raises CacheError for one that is damaged, for gc must not guess what it named."""
    found = []
    with unavailable(f"the roots of {store.root} cannot be read"):
        for path in sorted(_folder(store).glob(f"*{SUFFIX}")):
            if (root := _load(path)) is not None:
                found.append(root)
    return found


def split(keys: bytes) -> Iterator[bytes]:
    """The keys of a root, 16 bytes each."""
    return (keys[place : place + _KEY_BYTES] for place in range(0, len(keys), _KEY_BYTES))


@cache
def machine_identity() -> str:
    """This machine, by host name and installation, across restarts."""
    words = [platform.node()]
    installation = Path("/etc/machine-id")
    if installation.exists():
        words.append(installation.read_text())
    return str(blake3("\0".join(words).encode()).hexdigest(length=6))


def _folder(store: Store) -> Path:
    return store.root / "roots"


def _mount_of(path: Path) -> Path:
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def _to_bytes(root: Root) -> bytes:
    head = {
        "version": VERSION,
        "manifest": str(root.manifest),
        "host": root.host,
        "machine": root.machine,
        "mount": str(root.mount),
        "saved": root.saved,
        "registered": root.registered,
        "keys": len(root),
        "checksum": xxh3_64_hexdigest(root.keys),
    }
    return json.dumps(head).encode("ascii") + b"\n" + root.keys


def _load(path: Path) -> Root | None:
    """The root in a file; None when it is not there."""
    try:
        line, _, keys = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    try:
        head = json.loads(line)
        if head["version"] != VERSION:
            raise ValueError(f"version {head['version']!r}, expected {VERSION}")
        if len(keys) != head["keys"] * _KEY_BYTES or xxh3_64_hexdigest(keys) != head["checksum"]:
            raise ValueError("its keys do not match their checksum")
        return Root(
            id=path.name.removesuffix(SUFFIX),
            manifest=Path(head["manifest"]),
            host=str(head["host"]),
            machine=str(head["machine"]),
            mount=Path(head["mount"]),
            saved=bool(head["saved"]),
            registered=float(head["registered"]),
            keys=keys,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(
            f"the root {path} cannot be read ({error}); remove it, and cache the data set of its run again so that its "
            "records are registered"
        ) from error
