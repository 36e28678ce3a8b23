"""Files that are either there, complete and on the disk, or not there at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from dittocache.embeddings.store import writer_id

TEMPORARY_PATTERN = ".*.tmp"


def replace_file(path: Path, content: bytes) -> None:
    """Make `path` hold `content`, atomically and durably; its mode follows the umask.

    The bytes go to a temporary file in the same folder, which is synced and renamed; then the folder is synced. When
    this fails the temporary file is removed. Raises OSError.
    """
    temporary = path.with_name(f".{path.stem}.{writer_id.current()}.{secrets.token_hex(4)}.tmp")
    try:
        _write_new(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def writer_of(temporary: Path) -> str:
    """The writer's id in the name of a temporary file."""
    return temporary.name.rsplit(".", 3)[-3]


def _write_new(path: Path, content: bytes) -> None:
    """Write a new file and wait until its bytes are on the disk; its mode follows the umask."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make names in the folder durable, where the file system offers that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync names by themselves
            raise
    finally:
        os.close(descriptor)
