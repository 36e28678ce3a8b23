"""A store with records of every form, for the tests of reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store.store import Store
from dittocache.families.base import Tensors

FORMS: dict[str, dict[str, Any] | None] = {
    "native": None,
    "float16": {"dtype": "float16"},
    "fp8": {"dtype": "fp8_e4m3_token"},
}


def write(store: Store, artifact: str, tensor: torch.Tensor, storage: dict[str, Any] | None = None, **more: Any) -> str:
    """Store a tensor under a recipe of its own, and give the key."""
    recipe = {"artifact": artifact, **more}
    if storage is not None:
        recipe["storage"] = storage
    key = recipe_key(recipe)
    store.write(key, tensor, recipe)
    return key


def write_samples(store: Store, samples: dict[str, Tensors]) -> Manifest:
    """Store samples natively; another content has another key."""
    keys: dict[str, dict[str, str]] = {}
    for name, tensors in samples.items():
        for artifact, tensor in tensors.items():
            content = hash(tuple(tensor.flatten().tolist()))
            keys.setdefault(name, {})[artifact] = write(store, artifact, tensor, shape=list(tensor.shape), hash=content)
    return Manifest(keys)


def path_of(store: Store, key: str) -> Path:
    return Path(store.root) / "objects" / key[:2] / f"{key}.safetensors"


def flips(content: bytes, count: int = 60) -> Iterator[bytes]:
    """The content with one bit flipped, at places spread over the header and the tensors."""
    for number in range(count):
        place = number * (len(content) - 1) // (count - 1)
        changed = bytearray(content)
        changed[place] ^= 1 << (number % 8)
        yield bytes(changed)
