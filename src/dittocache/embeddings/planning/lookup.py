"""Which of many keys the store has."""

from __future__ import annotations

import numpy as np

from dittocache.data.digests import DIGEST_BYTES
from dittocache.embeddings.planning.keytable import Bytes, Numbers
from dittocache.embeddings.store.store import Store


def record_lengths(store: Store, keys: Bytes) -> Numbers:
    """Length in bytes of each key's record, -1 where there is none, for distinct keys `(n, 16)` uint8."""
    digits, width = keys.tobytes().hex(), 2 * DIGEST_BYTES
    names = [digits[start : start + width] for start in range(0, len(digits), width)]
    found = store.sizes(names)
    return np.array([found.get(name, -1) for name in names], np.int64)
