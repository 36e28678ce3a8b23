"""The embedding cache's specified way in: `python -m dittocache.main --config C [--cache]`.

With `--cache` it encodes what is missing, without it trains (which encodes what is missing first). Settings may
follow, as for `dittocache cache` and `dittocache train`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dittocache.cli.app import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dittocache cache` or `dittocache train` and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = "cache" if "--cache" in words else "train"
    return run([command, *(word for word in words if word != "--cache")])


if __name__ == "__main__":
    sys.exit(main())
