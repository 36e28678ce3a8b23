"""Which layout a store has: one small file that keeps an older or newer version of dittocache from misreading it."""

from __future__ import annotations

import json

from dittocache.errors import CacheError

LAYOUT_NAME = "layout.json"
LAYOUT_VERSION = 2


def layout_content() -> bytes:
    """The file of a store that this version writes."""
    return json.dumps({"version": LAYOUT_VERSION}).encode()


def check_layout(store: str, content: bytes) -> None:
    """Accept the file of a store; raises CacheError unless it says this version's layout."""
    try:
        version = json.loads(content)["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(f"{store}/{LAYOUT_NAME} is damaged ({error!r}); remove it: it is written again") from error
    if version == LAYOUT_VERSION:
        return
    mend = "upgrade dittocache or choose another cache_dir"
    if isinstance(version, int) and version < LAYOUT_VERSION:
        mend = f"its records can no longer be read: remove {store} and cache the data set again"
    raise CacheError(
        f"the store {store} has layout {version!r}, this version of dittocache knows {LAYOUT_VERSION}; {mend}"
    )
