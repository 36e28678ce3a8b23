"""Files that are either there, complete and on the disk, or not there at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from dittocache.embeddings.store import writer_id

TEMPORARY_PATTERN = ".*.tmp"


def replace_file(path: Path, content: bytes) -> None:
    """Make `path` hold `content`, atomically and durably; its mode follows the umask.

    The bytes go to a temporary file in the same folder, which is synced and renamed; then the folder is synced. When
    this fails the temporary file is removed. Raises OSError.
    """
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """`replace_file` for many files: each is whole under its name or not there, and all are durable in the end.

    The file system commits them together, for far less than one by one. When this fails, files that have their name
    already keep it. Raises OSError.
    """
    temporaries: dict[Path, Path] = {}
    descriptors: list[int] = []
    try:
        for path, content in contents.items():
            temporaries[path] = path.with_name(f".{path.stem}.{writer_id.current()}.{secrets.token_hex(4)}.tmp")
            descriptors.append(_write_new(temporaries[path], content))
        for descriptor in descriptors:
            os.fsync(descriptor)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    for folder in {path.parent for path in contents}:
        sync_folder(folder)


def writer_of(temporary: Path) -> str:
    """The writer's id in the name of a temporary file."""
    return temporary.name.rsplit(".", 3)[-3]


def _write_new(path: Path, content: bytes) -> int:
    """A descriptor of a new file with these bytes, which are not synced yet; its mode follows the umask."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


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
