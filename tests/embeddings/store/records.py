"""Records for tests: small, different from each other, and made from their number alone."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store.store import Store

ARTIFACTS = ("image_latents", "prompt_embeds", "img_shapes")
DTYPES = {"image_latents": torch.bfloat16, "prompt_embeds": torch.float32, "img_shapes": torch.int64}


def recipe(number: int, **fields: Any) -> dict[str, Any]:
    return {"artifact": ARTIFACTS[number % 3], "schema": 1, "family": "toy", "inputs": [number], **fields}


def key(number: int) -> str:
    return recipe_key(recipe(number))


def tensor(number: int) -> torch.Tensor:
    """(rows, 5) of the artifact's dtype; lengths that are no multiple of 8 are among them."""
    rows = 3 + number % 7
    return (torch.arange(rows * 5).reshape(rows, 5) + number).to(DTYPES[ARTIFACTS[number % 3]])


def fill(store: Store, numbers: range) -> list[str]:
    """Store these records, without waiting for the disk, and give their keys."""
    with mock.patch("os.fsync"):
        for number in numbers:
            store.write(key(number), tensor(number), recipe(number))
    return [key(number) for number in numbers]


def assert_right(store: Store, numbers: range) -> None:
    for number in numbers:
        found = store.read(key(number))
        assert found.dtype == tensor(number).dtype and torch.equal(found, tensor(number)), number
