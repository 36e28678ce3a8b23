"""What storing in fewer bits has cost, measured on some of the records that are written."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dittocache.embeddings.store.forms import to_restored, to_stored
from dittocache.embeddings.store.storage import FP8_FORM, storage_error

MEASURED_FIRST = 16  # of every artifact; measuring costs more than storing
MEASURED_EVERY = 32
_WORDS = {FP8_FORM: "fp8 per token"}


@dataclass
class _Cost:
    form: str
    records: int = 0
    measured: int = 0
    squares: float = 0.0
    worst_cosine: float = 1.0
    native: int = 0
    native_because: str = ""


class StorageCosts:
    """Collects, from any number of threads, the error of each artifact's form."""

    def __init__(self) -> None:
        self._costs: dict[str, _Cost] = {}
        self._changing = threading.Lock()

    def measure(self, tensor: torch.Tensor, recipe: Mapping[str, Any]) -> None:
        """Take in one record; `tensor` is on the CPU, as the encoder made it."""
        form = (recipe.get("storage") or {}).get("dtype")
        if form is None:
            return
        with self._changing:
            cost = self._costs.setdefault(str(recipe["artifact"]), _Cost(form))
            cost.records += 1
            if cost.records > MEASURED_FIRST and cost.records % MEASURED_EVERY:
                return
        stored = to_stored(tensor.contiguous(), {"storage": {"dtype": form}})
        found = storage_error(tensor, to_restored(stored))
        with self._changing:
            cost.measured += 1
            cost.squares += found.relative_rms**2
            cost.worst_cosine = min(cost.worst_cosine, found.worst_token_cosine)
            if stored.native_because:
                cost.native += 1
                cost.native_because = stored.native_because

    def lines(self) -> list[str]:
        """One sentence for each artifact that was changed by its form, or that its form did not fit."""
        lines = []
        for artifact, cost in sorted(self._costs.items()):
            of = f"measured on {cost.measured} of {cost.records} records"
            if cost.squares:
                rms = math.sqrt(cost.squares / cost.measured)
                cosine = f"{cost.worst_cosine:.4f}".removeprefix("0")
                lines.append(
                    f"{artifact} stored as {_WORDS.get(cost.form, cost.form)}: relative RMS {rms:.2%}, "
                    f"worst token cosine {cosine} ({of})"
                )
            if cost.native:
                lines.append(f"{cost.native} {artifact} kept in the encoder's dtype: {cost.native_because} ({of})")
        return lines
