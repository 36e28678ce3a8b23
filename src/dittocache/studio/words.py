"""Numbers in words, as short as a page wants them."""

from __future__ import annotations

import time


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 and rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def byte_count(count: float) -> str:
    """`812 kB`, `1.4 GB`, powers of ten as everywhere in dittocache."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def pace(items_a_second: float, item: str = "item") -> str:
    """`3.2 items/s`, or `12 s an item` where that is more telling."""
    if items_a_second <= 0:
        return ""
    return f"{items_a_second:.1f} {item}s/s" if items_a_second >= 0.5 else f"{1 / items_a_second:.1f} s a {item}"


def counted(count: int, thing: str) -> str:
    """`1 problem`, `1,200 problems`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def moment(seconds: float) -> str:
    """A time of the epoch as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
