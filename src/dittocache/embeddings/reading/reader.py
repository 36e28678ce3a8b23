"""Cached samples for training: verified reads, ahead of time, in threads of the training process.

Threads, because copying from worker processes costs more than reading does; reading and checksums release the GIL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.store.store import Store
from dittocache.errors import DataError, RecordCorruptError, RecordMissingError
from dittocache.families.base import Tensors

BATCHES_AHEAD = 2  # for each thread


class CachedSamples:
    """Reads samples of a manifest from a store."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest

    @property
    def names(self) -> list[str]:
        """The samples of the manifest, in order."""
        return list(self._manifest.samples)

    def load(self, name: str) -> Tensors:
        """All artifacts of a sample, on the CPU, each verified against its checksum.

        Raises DataError for a sample that the manifest does not have, and, naming the sample, RecordMissingError for
        one that is not cached or RecordCorruptError for one that was; the corrupt record is in quarantine then, and
        counts as missing in the next plan.
        """
        return {artifact: self.artifact(name, artifact) for artifact in self._keys(name)}

    def artifact(self, name: str, artifact: str) -> torch.Tensor:
        """One artifact of a sample; raises as `load` does."""
        keys = self._keys(name)
        if artifact not in keys:
            raise DataError(f"sample {name!r} has no artifact {artifact!r}; it has {', '.join(keys)}")
        try:
            return self._store.read(keys[artifact])
        except RecordMissingError as error:
            raise RecordMissingError(f"sample {name!r}, {artifact}: {error}") from error
        except RecordCorruptError as error:
            raise RecordCorruptError(f"sample {name!r}, {artifact}: {error}") from error

    def prefetch(self, batches: Iterable[Sequence[str]], threads: int = 2) -> Iterator[list[Tensors]]:
        """`load` for one batch of names after another, in order, a few batches ahead of the caller.

        An error is raised where its batch would have been given out; closing the iterator early stops the reading.
        """
        waiting: deque[list[Future[Tensors]]] = deque()
        with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="cached-samples") as pool:
            try:
                for names in batches:
                    waiting.append([pool.submit(self.load, name) for name in names])
                    if len(waiting) > threads * BATCHES_AHEAD:
                        yield [future.result() for future in waiting.popleft()]
                while waiting:
                    yield [future.result() for future in waiting.popleft()]
            finally:
                for futures in waiting:
                    for future in futures:
                        future.cancel()

    def _keys(self, name: str) -> dict[str, str]:
        if name not in self._manifest.samples:
            raise DataError(f"no sample {name!r} among the {len(self._manifest.samples)} of the manifest")
        return dict(self._manifest.samples[name])
