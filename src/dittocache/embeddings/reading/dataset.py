"""The cache as a map-style data set, for those who want a torch DataLoader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.reading.collate import collate
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.embeddings.store.store import Store
from dittocache.families.base import Tensors


@dataclass(frozen=True)
class CachedSample:
    """One sample as a data set gives it: its name and its artifacts, without a batch axis."""

    name: str
    tensors: Tensors


class CachedDataset(Dataset[CachedSample]):
    """Samples of a manifest by number, for `DataLoader(dataset, batch_size, collate_fn=dataset.collate)`.

    Worker processes may be forked or spawned. They are slower than the threads of `CachedBatches`: every tensor is
    copied once more on its way out of the worker.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._reader = CachedSamples(store, manifest, pin=False)  # CUDA must not be touched in a forked worker
        self._names = self._reader.names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> CachedSample:
        """One sample, verified; raises RecordMissingError or RecordCorruptError, naming it; IndexError at the end."""
        return CachedSample(self._names[index], self._reader.load(self._names[index]))

    @staticmethod
    def collate(samples: Sequence[CachedSample]) -> Tensors:
        """The batch that `CachedBatches` gives for these samples; raises DataError when they do not go together."""
        return collate([sample.name for sample in samples], [sample.tensors for sample in samples])
