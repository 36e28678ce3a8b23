"""Small sets of pictures and the lists that name them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image

from dittocache.data.config import SetConfig
from dittocache.data.listed.entry import Entry
from dittocache.data.listed.listing import read_listing


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def picture_bytes(colour: str, form: str = "PNG") -> bytes:
    content = BytesIO()
    Image.new("RGB", (4, 4), colour).save(content, form)
    return content.getvalue()


def read(
    path: Path,
    columns: dict[str, str | list[str]] | None = None,
    memory: Path | None = None,
    caption_extension: str = ".txt",
) -> tuple[list[Entry], list[str]]:
    """The entries and the problems of a list."""
    problems: list[str] = []
    settings = SetConfig(path=path, columns=columns or {}, caption_extension=caption_extension)
    return read_listing(path, settings, memory, problems), problems


def entries_of(
    path: Path, columns: dict[str, str | list[str]] | None = None, memory: Path | None = None
) -> list[Entry]:
    """The entries of a list in which nothing is wrong."""
    entries, problems = read(path, columns, memory)
    assert problems == []
    return entries


def problems_of(path: Path, columns: dict[str, str | list[str]] | None = None, memory: Path | None = None) -> list[str]:
    """The problems of a list, with the path of the list left out."""
    return [problem.replace(str(path), path.name) for problem in read(path, columns, memory)[1]]
