"""How many bytes a plan still has to write, told before anything is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dittocache.data.sample import Sample
from dittocache.embeddings.planning.keytable import KeyTable
from dittocache.embeddings.planning.misses import Misses
from dittocache.embeddings.recipe import canonical_json
from dittocache.embeddings.store.storage import FP8_FORM
from dittocache.families.base import Sizes
from dittocache.families.estimates import ArtifactSize, SizeEstimator, SizeOf

COUNTED = 256  # samples whose prompts are counted in tokens; the rest are taken to be like them
_HEADER_BYTES = 230  # of a record besides its recipe: names, shapes, checksums
_RESTORES_BYTES, _COMPANION_BYTES = 55, 85  # more of them: what the tensor restores to, and each tensor beside it
_SCALE_BYTES, _ROW_NUMBER_BYTES = 4, 4


@dataclass(frozen=True)
class BytesEstimate:
    """What is still to be written.

    Attributes:
        total: bytes of all records that are missing.
        by_artifact: the same for each artifact.
    """

    total: int
    by_artifact: Mapping[str, int]


def estimate_bytes(
    samples: Sequence[Sample],
    table: KeyTable,
    missed: Misses,
    estimator: SizeEstimator,
    sizes: Sizes,
    dtype: torch.dtype,
    size_of: SizeOf,
) -> BytesEstimate:
    """Bytes of the missing records.

    Latents are told for every sample; prompt embeddings for some samples spread over the set, from which the others
    follow. `samples` are those of the table in its order.
    """
    totals: dict[str, float] = {}
    text: dict[str, list[int]] = {}
    for row, artifacts in missed.by_row():
        latents = estimator.latent_sizes(samples[row], sizes, size_of)
        shape = table.shapes[table.shape_of[row]]
        for number in artifacts:
            name = shape.artifacts[number]
            if name in latents:
                totals[name] = totals.get(name, 0.0) + _record_bytes(latents[name], table, row, number, dtype)
            else:
                text.setdefault(name, []).append(row)
    known: dict[int, Mapping[str, ArtifactSize]] = {}
    for name, rows in text.items():
        spread = np.linspace(0, len(rows) - 1, min(COUNTED, len(rows)), dtype=np.int64)
        counted = 0
        for row in (rows[at] for at in spread.tolist()):
            if row not in known:
                known[row] = estimator.text_sizes(samples[row], sizes, size_of)
            if name in known[row]:
                number = table.shapes[table.shape_of[row]].artifacts.index(name)
                counted += _record_bytes(known[row][name], table, row, number, dtype)
        totals[name] = counted / len(spread) * len(rows)
    by_artifact = {name: round(count) for name, count in totals.items()}
    return BytesEstimate(sum(by_artifact.values()), by_artifact)


def _record_bytes(size: ArtifactSize, table: KeyTable, row: int, artifact: int, dtype: torch.dtype) -> int:
    """The whole record: tensor, companions and header, in the form that the recipe asks for."""
    recipe = table.recipe(row, artifact) or {}
    storage = recipe.get("storage") or {}
    element = size.element_bytes or dtype.itemsize
    rows, row_bytes = size.rows, 0
    header = len(canonical_json(recipe)) + _HEADER_BYTES + (_RESTORES_BYTES if storage else 0)
    if size.element_bytes is None and storage.get("dtype") == FP8_FORM:
        element, row_bytes = 1, _SCALE_BYTES
        header += _COMPANION_BYTES
    elif size.element_bytes is None and storage.get("dtype") == "float16":
        element = min(element, 2)
    if "rows_shared_with" in storage:
        rows, row_bytes = rows - size.shared_rows, row_bytes + _ROW_NUMBER_BYTES
        header += _COMPANION_BYTES
    return rows * (size.width * element + row_bytes) + header
