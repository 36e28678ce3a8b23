"""Every error that dittocache raises on purpose.

    DittocacheError
    +-- ConfigError            a setting is missing, misspelt or out of range
    +-- DataError              a data set, or one of its files, cannot be used
    +-- ModelError             a checkpoint is missing, incomplete or of a kind that is not supported
    +-- CacheError             the embedding cache cannot do what was asked
    |   +-- RecordCorruptError     a stored record does not match its checksum, or is torn
    |   +-- RecordMissingError     a key that a manifest names is not in the store
    |   +-- StoreUnavailableError  disk full, read-only folder, path too long
    +-- StepCacheError         TeaCache cannot be applied, or was used out of turn
    +-- ReferenceCacheError    the reference-image KV cache cannot be applied
    +-- StageError             a stage of a job failed
    +-- AccessError            the Studio refuses a path outside its folders, or an upload of another kind or size

Messages say what was found, what was expected and how to mend it. `problems` lists all of
them when several were found at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class DittocacheError(Exception):
    """Base of all errors raised by dittocache.

    Args:
        message: what was found, what was expected, how to mend it.
        problems: every single problem, when the check found several at once.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        if self.problems:
            message = "\n".join([message, *(f"  - {problem}" for problem in self.problems)])
        super().__init__(message)


class ConfigError(DittocacheError, ValueError):
    """A setting is missing, misspelt or out of range."""


class DataError(DittocacheError, ValueError):
    """A data set, or one of its files, cannot be used."""


class ModelError(DittocacheError):
    """A checkpoint is missing, incomplete or of a kind that is not supported."""


class CacheError(DittocacheError):
    """The embedding cache cannot do what was asked."""


class RecordCorruptError(CacheError):
    """A stored record does not match its checksum, or is torn."""


class RecordMissingError(CacheError, KeyError):
    """A key that a manifest names is not in the store."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class StoreUnavailableError(CacheError, OSError):
    """The store's folder cannot be written or read: disk full, read-only, path too long."""


class StepCacheError(DittocacheError, ValueError):
    """TeaCache cannot be applied, or was used out of turn."""


class ReferenceCacheError(DittocacheError, ValueError):
    """The reference-image KV cache cannot be applied."""


class StageError(DittocacheError):
    """A stage of a job failed."""


class AccessError(DittocacheError):
    """The Studio refuses a path outside its folders, or an upload of another kind or size."""


@contextmanager
def listed_in(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Add what the block raises to `problems`: each single problem where several were found."""
    try:
        yield
    except DittocacheError as error:
        problems.extend(prefix + problem for problem in error.problems or [str(error)])
