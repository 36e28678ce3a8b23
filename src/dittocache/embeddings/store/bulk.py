"""Many records at once, straight into packs: for imports, where a kill may cost the last pack but no more.

Caching writes loose records instead: there every record is an encoder's work, and durable as soon as it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from dittocache.embeddings.store.maintenance import maintenance
from dittocache.embeddings.store.pack_file import Packed, write_pack
from dittocache.embeddings.store.packing import MOST_RECORDS, PACK_BYTES, adopt_packs
from dittocache.embeddings.store.record import pack, parse_header, unpack
from dittocache.embeddings.store.storage import bases_for
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.unavailable import unavailable


class PackWriter:
    """Takes records as `Store.write` does and stores them as packs; use it as a context manager.

    Args:
        store: in a folder; it may be read, written and cached into meanwhile.
        pack_bytes: so many bytes are kept in memory and written together.

    A record can be read once its pack is written: by `flush`, or on leaving the context, also by an exception.
    """

    def __init__(self, store: Store, pack_bytes: int = PACK_BYTES) -> None:
        self._store = store
        self._pack_bytes = pack_bytes
        self._waiting: dict[str, Packed] = {}
        self._bytes = 0

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()

    def write(
        self, key: str, tensor: torch.Tensor, recipe: Mapping[str, Any], *, provenance: Mapping[str, Any] | None = None
    ) -> int:
        """Take a tensor under the key of its recipe and return the record's length in bytes.

        A record that is there already stays. Raises CacheError when the key is not the recipe's, or while another
        process packs or removes records; StoreUnavailableError when a pack cannot be written.
        """
        if present := self._store.sizes([key]):
            return present[key]
        if key not in self._waiting:
            content = memoryview(pack(key, tensor, recipe, provenance, base=self._read))
            self._waiting[key] = Packed(parse_header(content, len(content)), content)
            self._bytes += len(content)
        length = len(self._waiting[key].content)
        if self._bytes >= self._pack_bytes or len(self._waiting) >= MOST_RECORDS:
            self.flush()
        return length

    def flush(self) -> None:
        """Write what waits; it is durable and can be read when this returns."""
        if not self._waiting:
            return
        records = self._store.local
        with unavailable(f"a pack of {len(self._waiting)} records cannot be written to {self._store.root}"):
            self._store.prepare()
            with maintenance(records):
                adopt_packs(records)
                name, length, places = write_pack(records.packed.folder, list(self._waiting.values()))
                records.packed.publish(records.packed.snapshot.index.with_packs({name: length}, places))
        self._waiting, self._bytes = {}, 0

    def _read(self, key: str) -> torch.Tensor:
        """A record that another one shares rows with, written or waiting."""
        if key in self._waiting:
            return unpack(bytearray(self._waiting[key].content), key, base=bases_for(key, self._read))
        return self._store.read(key)
