"""Names of the folders of runs."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path


def run_name(data: str) -> str:
    """A run's name from the name of a folder or file."""
    path = Path(data).absolute()
    return safe_name(path.name if path.is_dir() else path.stem)


def safe_name(text: str) -> str:
    """The text with nothing in it that a run's folder must not be called."""
    return re.sub(r"[^\w.\-]+", "-", text).strip("-.") or "run"


def dated_name(output_dir: Path, name: str, day: date | None = None) -> str:
    """`2026-11-21-my-edit`, with `-2` and so on behind it where that run is there already.

    The command line keeps plain names, so that the same command goes on with the same run; a page has a button for
    that, and begins a run of its own with every other press.
    """
    base = f"{(day or date.today()).isoformat()}-{safe_name(name)}"
    number, candidate = 1, base
    while (output_dir / candidate).exists():
        number += 1
        candidate = f"{base}-{number}"
    return candidate
