"""The operating system's refusals as errors that say how to mend them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dittocache.errors import CacheError, StoreUnavailableError

_MEND = {
    errno.ENOSPC: "the disk is full: free space or choose another cache_dir",
    errno.EDQUOT: "your quota is used up: free space or choose another cache_dir",
    errno.EROFS: "the file system is read-only: choose another cache_dir",
    errno.EACCES: "permission is denied: change the folder's owner or mode, or choose another cache_dir",
    errno.EPERM: "permission is denied: change the folder's owner or mode, or choose another cache_dir",
    errno.ENAMETOOLONG: "the path is too long for this file system: choose a shorter cache_dir",
    errno.ENOTDIR: "a part of the path is a file: choose another cache_dir",
    errno.EMFILE: "this process has too many files open: raise its limit (ulimit -n)",
}


@contextmanager
def unavailable(what: str) -> Iterator[None]:
    """Turn an OSError inside the context into a StoreUnavailableError: `what`, the system's words, and the remedy."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        mend = _MEND.get(error.errno or 0, "look after the disk or network mount, or choose another cache_dir")
        raise StoreUnavailableError(f"{what} ({error.strerror or error}): {mend}") from error
