"""Where a store is: a folder, or a URL that fsspec can open."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from dittocache.errors import CacheError

_FOLDED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")  # one letter only would be a drive


def location(place: Path | str) -> Path | str:
    """A folder as a path, `file://` included; anything else with `://` as the URL that it is, without a last slash.

    Raises CacheError for a URL that was made a `Path`, which folds its slashes: another place than was meant.
    """
    text = os.fspath(place)
    if folded := _FOLDED.match(text):
        raise CacheError(
            f"{text!r} is no folder and no URL; expected a folder, or {folded[1]}:// with two slashes, given as text "
            "(a Path folds them)"
        )
    if "://" not in text:
        return Path(text)
    protocol, _, rest = text.partition("://")
    if protocol in ("file", "local"):
        return Path(unquote(rest) if protocol == "file" else rest)
    return text.rstrip("/")
