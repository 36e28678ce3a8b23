"""The hashes that name files in qflux's caches: md5 of a file's bytes, of a text, and their combinations."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3
from PIL import Image

from dittocache.data.digests import DIGEST_BYTES, GRANULARITY_NS, Status, status_of
from dittocache.errors import DataError

EMPTY_PROMPT_WORD = "empty"  # what stands for the empty prompt in hashes
_CHUNK_BYTES = 1024 * 1024


def hash_string_md5(text: str) -> str:
    """md5 of the text's UTF-8 bytes, 32 hex digits."""
    return hashlib.md5(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()


class SourceHashes:
    """md5 and blake3 of source files; one is read once for as long as its status (size and times) stays the same."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Status, int, tuple[str, str]]] = {}

    def get_hash(self, file_or_image: str | os.PathLike[str] | Image.Image, prompt: str = "") -> str:
        """md5 of a file's bytes, followed by md5 of the prompt where one is given.

        An opened picture has no file: its hash is md5 of mode, size and pixels. (qflux takes a perceptual hash of 64
        bits there, under which two different pictures that look alike share one embedding.)

        Raises DataError when the file cannot be read.
        """
        own = (
            self._of_picture(file_or_image) if isinstance(file_or_image, Image.Image) else self._both(file_or_image)[0]
        )
        return own + (hash_string_md5(prompt) if prompt else "")

    def digest(self, file: str | os.PathLike[str]) -> str:
        """blake3 of the content, 128 bits as 32 hex digits, as recipes have it; raises DataError."""
        return self._both(file)[1]

    def _both(self, file: str | os.PathLike[str]) -> tuple[str, str]:
        path = os.path.abspath(file)
        status = status_of(Path(path))
        known = self._known.get(path)
        # A file may change twice within one tick of its clock: what was read too soon after a change is read again.
        if known is None or known[0] != status or max(status[1:]) + GRANULARITY_NS >= known[1]:
            began = time.time_ns()
            known = self._known[path] = (status, began, _file_digests(Path(path)))
        return known[2]

    @staticmethod
    def _of_picture(picture: Image.Image) -> str:
        hasher = hashlib.md5(f"{picture.mode} {picture.size} ".encode(), usedforsecurity=False)
        hasher.update(picture.tobytes())
        return hasher.hexdigest()


def file_hashes(data: Mapping[str, Any], source: SourceHashes) -> dict[str, str]:
    """All hashes of a sample, as the spec names them.

    `data` has any of `image`, `control` (path or picture), `controls` (the further ones) and `prompt`. Gives
    `image_hash`, `control_hash`, `prompt_hash`, `empty_prompt_hash`, `control_prompt_hash`,
    `control_empty_prompt_hash`, `control_1_hash` and so on, `controls_sum_hash` and `main_hash`.

    Raises DataError when a file cannot be read, or `controls` come without `control`.
    """
    hashes: dict[str, str] = {}
    if "image" in data:
        hashes["image_hash"] = source.get_hash(data["image"])
    if "control" in data:
        hashes["control_hash"] = hashes["controls_sum_hash"] = source.get_hash(data["control"])
    if "prompt" in data:
        hashes["prompt_hash"] = hash_string_md5(data["prompt"])
        hashes["empty_prompt_hash"] = hash_string_md5(EMPTY_PROMPT_WORD)
    if "control" in data and "prompt" in data:
        hashes["control_prompt_hash"] = source.get_hash(data["control"], data["prompt"])
        hashes["control_empty_prompt_hash"] = source.get_hash(data["control"], EMPTY_PROMPT_WORD)
    further: Sequence[Any] = data.get("controls") or ()
    if further and "control" not in data:
        raise DataError("a sample has `controls` and no `control`; give the first control picture as `control`")
    for number, control in enumerate(further, start=1):
        hashes[f"control_{number}_hash"] = source.get_hash(control)
        hashes["controls_sum_hash"] += hashes[f"control_{number}_hash"]
    hashes["main_hash"] = "".join(hashes.get(f"{part}_hash", "") for part in ("image", "control", "prompt"))
    return hashes


def _file_digests(file: Path) -> tuple[str, str]:
    """md5 and blake3 of a file's content, in one reading."""
    md5, content = hashlib.md5(usedforsecurity=False), blake3()
    try:
        with open(file, "rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                md5.update(chunk)
                content.update(chunk)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    return md5.hexdigest(), str(content.hexdigest(length=DIGEST_BYTES))
