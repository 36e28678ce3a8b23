"""Records behind a URL: one object each, put and got whole, through fsspec.

An object store shows an object only once all of it was put, and does not offer more: no locks, no leases, no packs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from dittocache.embeddings.store.loose import SUFFIX, is_key
from dittocache.errors import CacheError, StoreUnavailableError

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
    "oss": "ossfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
RETRY_SECONDS = (0.2, 1.0, 5.0)
LISTING_FROM = 64  # keys: above, listing is faster than asking for each
LISTING_BY_PREFIX_FROM = 20_000  # keys: above, the 256 parts of the listing are fetched side by side
THREADS = 16
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotImplementedError,
    ImportError,
    TypeError,
    ValueError,
)

_T = TypeVar("_T")


class RemoteRecords:
    """The records below one URL.

    Args:
        url: such as `s3://bucket/cache`.

    Raises CacheError when no file system for the URL is known, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._system, self._root = _open(url)

    def path(self, key: str) -> str:
        """Where the object of a key is; raises CacheError for what is no key."""
        if not is_key(key):
            raise CacheError(f"{key!r} is no key; expected 32 hex digits (recipe_key)")
        return f"{self._root}/objects/{key[:2]}/{key}{SUFFIX}"

    def get(self, name: str, end: int | None = None) -> bytes:
        """All bytes of an object, or the first `end`; raises FileNotFoundError or StoreUnavailableError."""
        return self._try(f"{name} cannot be read", lambda: bytes(self._system.cat_file(name, end=end)))

    def put(self, name: str, content: bytes) -> None:
        """Make an object hold these bytes; nobody ever sees a part of them. Raises StoreUnavailableError."""
        try:
            self._try(f"{name} cannot be written", lambda: self._system.pipe_file(name, content))
        except FileNotFoundError as error:
            raise StoreUnavailableError(f"{name} cannot be written ({error}): create the bucket first") from error

    def remove(self, name: str) -> None:
        """Remove an object; raises FileNotFoundError or StoreUnavailableError."""
        self._try(f"{name} cannot be removed", lambda: self._system.rm_file(name))

    def length(self, name: str) -> int:
        """Of an object, in bytes; raises FileNotFoundError or StoreUnavailableError."""
        return self._try(f"{name} cannot be read", lambda: int(self._system.info(name)["size"]))

    def name(self, *parts: str) -> str:
        """An object's name, from its parts below the URL."""
        return "/".join((self._root, *parts))

    def sizes(self, keys: Collection[str]) -> dict[str, int]:
        """Length in bytes of the records that are there; of many keys, from a listing of the store."""
        wanted = set(keys)
        if len(wanted) < LISTING_FROM:
            with ThreadPoolExecutor(THREADS) as pool:
                return {
                    key: size
                    for key, size in zip(wanted, pool.map(self._size, wanted), strict=True)
                    if size is not None
                }
        prefixes = sorted({key[:2] for key in wanted}) if len(wanted) >= LISTING_BY_PREFIX_FROM else [""]
        with ThreadPoolExecutor(THREADS) as pool:
            return {
                key: size for listed in pool.map(self._list, prefixes) for key, size in listed.items() if key in wanted
            }

    def keys(self) -> Iterator[str]:
        """Keys of all records, in the order of their names."""
        yield from self._list("")

    def _size(self, key: str) -> int | None:
        try:
            return self.length(self.path(key))
        except FileNotFoundError:
            return None

    def _list(self, prefix: str) -> dict[str, int]:
        """Key -> length in bytes of all records in one part of the store, or in all of it."""
        folder = self.name("objects", *([prefix] if prefix else []))
        try:
            found: dict[str, Any] = self._try(
                f"{folder} cannot be listed", lambda: self._system.find(folder, detail=True)
            )
        except FileNotFoundError:
            return {}
        sizes = {}
        for name, entry in found.items():
            key = name.rpartition("/")[2].removesuffix(SUFFIX)
            if is_key(key) and name.endswith(f"/{key[:2]}/{key}{SUFFIX}"):
                sizes[key] = int(entry["size"])
        return sizes

    def _try(self, what: str, call: Callable[[], _T]) -> _T:
        """Call, and again after a while where waiting may help; raises FileNotFoundError or StoreUnavailableError."""
        for seconds in (*RETRY_SECONDS, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:  # each file system has a family of exceptions of its own
                if seconds is None or isinstance(error, _FINAL) or _is_about_credentials(error):
                    raise StoreUnavailableError(f"{what} ({_words(error)}): {_mend(error)}") from error
            time.sleep(seconds * random.uniform(0.5, 1.5))  # apart from other workers who met the same refusal
        raise AssertionError("unreachable")


def _open(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0].rpartition("::")[2]
    try:
        # Listings must show what other processes put: fsspec would remember them for as long as this process lives.
        system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        mend = f"pip install {package}" if package else f"install the package that fsspec names: {error}"
        raise CacheError(f"cache_dir {url}: no package for {protocol}:// is installed; {mend}") from error
    except ValueError as error:
        raise CacheError(
            f"cache_dir {url}: {error}; expected a folder, s3://bucket/folder, gs://bucket/folder, or another URL that "
            "fsspec knows"
        ) from error
    except Exception as error:
        raise StoreUnavailableError(f"cache_dir {url} cannot be opened ({_words(error)}): {_mend(error)}") from error
    return system, root.rstrip("/")


def _is_about_credentials(error: Exception) -> bool:
    return any("credential" in type(one).__name__.lower() for one in (error, error.__cause__, error.__context__) if one)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _mend(error: Exception) -> str:
    if _is_about_credentials(error) or isinstance(error, PermissionError):
        return "log in (for s3 `aws configure`, for gs `gcloud auth application-default login`) and ask for access"
    return "look after the network and the store, or choose another cache_dir"
