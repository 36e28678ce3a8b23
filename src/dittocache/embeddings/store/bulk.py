"""Many records at once, straight into packs: for imports, where a kill may cost the last pack but no more.

Caching writes loose records instead: there every record is an encoder's work, and durable as soon as it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dittocache.embeddings.store.maintenance import maintenance
from dittocache.embeddings.store.pack_file import Packed, write_pack
from dittocache.embeddings.store.pack_index import Place
from dittocache.embeddings.store.packing import MOST_RECORDS, PACK_BYTES, adopt_packs
from dittocache.embeddings.store.record import pack, parse_header, unpack
from dittocache.embeddings.store.storage import bases_for
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.unavailable import unavailable

WrittenPack = tuple[str, int, list[tuple[str, Place]]]


class PackWriter:
    """Takes records as `Store.write` does and stores them as packs; use it as a context manager.

    Args:
        store: in a folder; it may be read, written and cached into meanwhile.
        pack_bytes: so many bytes are written together; twice as many are kept in memory.

    A record can be read once its pack is written: by `flush`, or on leaving the context, also by an exception.
    """

    def __init__(self, store: Store, pack_bytes: int = PACK_BYTES) -> None:
        self._store = store
        self._pack_bytes = pack_bytes
        self._waiting: dict[str, Packed] = {}
        self._bytes = 0
        # Packs on their way to the disk: while one is synced, the next one is filled.
        self._underway: deque[tuple[dict[str, Packed], Future[WrittenPack]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pack-writer")

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            self._thread.shutdown()

    def write(
        self, key: str, tensor: torch.Tensor, recipe: Mapping[str, Any], *, provenance: Mapping[str, Any] | None = None
    ) -> int:
        """Take a tensor under the key of its recipe and return the record's length in bytes.

        A record that is there already stays. Raises CacheError when the key is not the recipe's, or while another
        process packs or removes records; StoreUnavailableError when a pack cannot be written.
        """
        if present := self._store.sizes([key]):
            return present[key]
        packed = self._taken(key)
        if packed is None:
            content = memoryview(pack(key, tensor, recipe, provenance, base=self._read))
            packed = self._waiting[key] = Packed(parse_header(content, len(content)), content)
            self._bytes += len(content)
        if self._bytes >= self._pack_bytes or len(self._waiting) >= MOST_RECORDS:
            self._begin()
            self._publish(left=1)
        return len(packed.content)

    def flush(self) -> None:
        """Write what waits; it is durable and can be read when this returns."""
        self._begin()
        self._publish(left=0)

    def _begin(self) -> None:
        """Start to write what waits as one pack."""
        if self._waiting:
            records = list(self._waiting.values())
            with unavailable(f"the store {self._store.root} cannot be written"):
                self._store.prepare()
            self._underway.append((self._waiting, self._thread.submit(write_pack, self._folder, records)))
            self._waiting, self._bytes = {}, 0

    def _publish(self, left: int) -> None:
        """Name the packs that are written in the index, until at most `left` are on their way."""
        while len(self._underway) > left:
            batch, written = self._underway.popleft()
            with unavailable(f"a pack of {len(batch)} records cannot be written to {self._store.root}"):
                written.result()
                with maintenance(self._store.local):
                    adopt_packs(self._store.local)  # unless another process has done so, or has stored the same records

    @property
    def _folder(self) -> Path:
        return self._store.local.packed.folder

    def _taken(self, key: str) -> Packed | None:
        """A record that is not in a published pack yet."""
        batches = [self._waiting, *(batch for batch, _ in self._underway)]
        return next((batch[key] for batch in batches if key in batch), None)

    def _read(self, key: str) -> torch.Tensor:
        """A record that another one shares rows with, written or waiting."""
        packed = self._taken(key)
        if packed is None:
            return self._store.read(key)
        return unpack(bytearray(packed.content), key, base=bases_for(key, self._read))
