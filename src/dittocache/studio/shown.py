"""Names of files and other people's words, as they may be shown on a page."""

from __future__ import annotations

import unicodedata

# Control characters, direction overrides and other marks without a shape, halves of surrogate pairs, private use,
# unassigned: a name may hold them, and they could forge a line, turn text round or break the page's JSON.
_UNSHOWN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_JOINERS = frozenset("\u200c\u200d")  # part of the spelling in several scripts, and of emoji


def shown(name: object, limit: int = 200) -> str:
    """The text with every character that has no shape written as an escape, cut in the middle at `limit` characters.

    Markup is not touched: labels, table cells and notifications of the pages show text as it is, and a test keeps
    raw HTML out of them.
    """
    text = "".join(_escaped(character) for character in str(name))
    if len(text) <= limit:
        return text
    kept = (limit - 1) // 2
    return f"{text[:kept]}…{text[-kept:]}"


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNSHOWN or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")
