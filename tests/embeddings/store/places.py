"""Stores in every kind of place, with a way around them: to look at a record's bytes, or to damage them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import fsspec

from dittocache.embeddings.store.store import Store


class Place(Protocol):
    """Where a store is."""

    location: Path | str

    def get(self, key: str) -> bytes:
        """The bytes in the place of a record; raises FileNotFoundError."""
        ...

    def put(self, key: str, content: bytes) -> None:
        """Put any bytes in the place of a record."""
        ...

    def quarantined(self) -> list[bytes]:
        """What was taken out of the store."""
        ...

    def put_layout(self, content: bytes) -> None:
        """Put any bytes in the place of the layout."""
        ...


class Folder:
    def __init__(self, folder: Path) -> None:
        self.location: Path | str = folder
        self._folder = folder

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def put(self, key: str, content: bytes) -> None:
        self._path(key).parent.mkdir(parents=True, exist_ok=True)
        self._path(key).write_bytes(content)

    def quarantined(self) -> list[bytes]:
        return [path.read_bytes() for path in (self._folder / "quarantine").glob("*")]

    def put_layout(self, content: bytes) -> None:
        (self._folder / "layout.json").write_bytes(content)

    def _path(self, key: str) -> Path:
        return self._folder / "objects" / key[:2] / f"{key}.safetensors"


class Objects:
    def __init__(self, url: str) -> None:
        self.location: Path | str = url
        self._url = url
        self._system = fsspec.filesystem(url.partition("://")[0])

    def get(self, key: str) -> bytes:
        return bytes(self._system.cat_file(self._path(key)))

    def put(self, key: str, content: bytes) -> None:
        self._system.pipe_file(self._path(key), content)

    def quarantined(self) -> list[bytes]:
        return list(self._system.cat(f"{self._url}/quarantine/*").values())

    def put_layout(self, content: bytes) -> None:
        self._system.pipe_file(f"{self._url}/layout.json", content)

    def _path(self, key: str) -> str:
        return f"{self._url}/objects/{key[:2]}/{key}.safetensors"


def store_at(place: Place) -> Store:
    """A store there, as another process would open it."""
    return Store(place.location)
