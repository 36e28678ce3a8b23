"""Tables of many rows as one file of named arrays that loads in milliseconds and is checked against its checksum.

    "dittocache columns 1\\n"   magic
    16 bytes                   xxh3-128 of everything that follows
    safetensors                one tensor for each column, and `head`: JSON in UTF-8 for what is no array

For what can be computed again: whoever finds such a file damaged starts it afresh.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

MAGIC = b"dittocache columns 1\n"
_HEAD = "head"
_CHECKSUM_BYTES = 16

Columns = dict[str, npt.NDArray[Any]]


def save_columns(path: Path, head: Mapping[str, Any], columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write the file atomically; raises OSError, leaving nothing behind."""
    text = np.frombuffer(json.dumps(dict(head), separators=(",", ":")).encode(), np.uint8)
    content = save({**{name: np.ascontiguousarray(column) for name, column in columns.items()}, _HEAD: text})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "xb") as stream:
            stream.write(MAGIC + xxhash.xxh3_128_digest(content))
            stream.write(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load_columns(path: Path) -> tuple[dict[str, Any], Columns]:
    """The head and the columns; raises OSError when there is no such file, ValueError when it is damaged."""
    content = path.read_bytes()
    start = len(MAGIC) + _CHECKSUM_BYTES
    if not content.startswith(MAGIC):
        raise ValueError(f"{path} is no file of columns of this version")
    body = content[start:]
    if xxhash.xxh3_128_digest(body) != content[len(MAGIC) : start]:
        raise ValueError(f"{path} does not match its checksum")
    try:
        columns = load(body)
        head: dict[str, Any] = json.loads(columns.pop(_HEAD).tobytes())
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no columns ({error})") from error
    return head, columns
