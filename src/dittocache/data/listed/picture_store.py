"""Pictures that come as bytes, kept as files that are called after their content.

    FOLDER/<blake3 of the bytes, 128 bits as 32 hex digits>.<ending of the picture's format>

The bytes are kept as they are, nothing is encoded again. Equal pictures are one file. Several processes may write at
once: each writes a file of its own and renames it, and what they write under one name is the same.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from blake3 import blake3
from PIL import Image, UnidentifiedImageError

from dittocache.data.digests import DIGEST_BYTES
from dittocache.errors import DataError, StoreUnavailableError

_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


class PictureStore:
    """Files for pictures that have none; `folder` need not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, content: bytes) -> str:
        """The name of the file in the folder that holds these bytes, written where it is missing or holds others.

        Raises DataError when the bytes are no picture, StoreUnavailableError when the file cannot be written.
        """
        digest = blake3(content).hexdigest(length=DIGEST_BYTES)
        name = f"{digest}.{_ending(content)}"
        file = self.folder / name
        if _read(file) != content:
            self._write(file, content)
        return name

    def _write(self, file: Path, content: bytes) -> None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, file)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StoreUnavailableError(
                f"pictures of the data set cannot be kept in {self.folder} ({error.strerror or error}); free space "
                "there or choose another cache_dir"
            ) from error


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _ending(content: bytes) -> str:
    try:
        with Image.open(BytesIO(content)) as picture:
            kind = picture.format or ""
    except UnidentifiedImageError as error:
        raise DataError(f"{len(content)} bytes that are no picture, or a damaged one") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"a picture that cannot be read ({error})") from error
    return _ENDINGS.get(kind, kind.lower())
