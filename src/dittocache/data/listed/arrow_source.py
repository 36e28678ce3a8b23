"""Rows of Hugging Face data sets, a few at a time, so that memory does not grow with the set.

What is held at once is a page of parquet: 100 rows as datasets writes it, 1,024 as pyarrow does by default. Parquet is
read as it lies (the package datasets would first write all of it again), folders of `save_to_disk` through
datasets itself. Pictures come as their bytes: nothing is decoded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dittocache.data.listed.kinds import parquet_files
from dittocache.errors import DataError

BATCH_ROWS = 16
_BUFFER_BYTES = 4 * 1024 * 1024  # without it a whole column of a row group is read at once
_TRAIN = "train"

Rows = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Part:
    """One file or split of a data set.

    Attributes:
        name: of its samples, in front of their numbers; empty where there is only one part without a name.
        columns: what its rows hold.
        rows: gives the rows with these columns, numbered from 0 as in `dataset[0]`.
    """

    name: str
    columns: Sequence[str]
    rows: Callable[[Sequence[str]], Rows]


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        path: what it is called in messages.
        folder: what paths of pictures in its cells are relative to.
        files: what it is read from; it is the same data set for as long as they do not change.
        parts: its parts in order.
    """

    path: Path
    folder: Path
    files: Sequence[Path]
    parts: Sequence[Part]


def parquet_source(path: Path) -> Source:
    """One parquet file, or all below a folder; raises DataError naming each that is damaged."""
    parquet = package("pyarrow.parquet")
    files = [path] if path.is_file() else parquet_files(path)
    folder = path.parent if path.is_file() else path
    parts, problems = [], []
    for file in files:
        name = file.relative_to(folder).with_suffix("").as_posix()
        try:
            with parquet.ParquetFile(file) as opened:
                columns = list(opened.schema_arrow.names)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: no parquet file, or a damaged one ({first_line(error)})")
            continue
        parts.append(Part(name, columns, partial(_parquet_rows, file)))
    if problems:
        raise DataError(f"the data set {path} has damaged files", problems)
    return Source(path, folder, files, parts)


def saved_source(path: Path) -> Source:
    """What `save_to_disk` has written: the split `train`, or the only one; raises DataError when it cannot be read."""
    datasets = package("datasets")
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a data set of save_to_disk ({first_line(error)})") from error
    return dataset_source(path, path, found)


def dataset_source(path: Path, folder: Path, found: Any) -> Source:
    """A Dataset or DatasetDict of the package datasets; raises DataError when no split is called train among several.

    Args:
        path: what it is called in messages.
        folder: what paths of pictures in its cells are relative to.
    """
    if not isinstance(found, dict):
        return Source(path, folder, _cache_files(found), [_dataset_part("", found)])
    name = _TRAIN if _TRAIN in found else next(iter(found), _TRAIN)
    if name not in found or (name != _TRAIN and len(found) > 1):
        raise DataError(f"{path} has the splits {', '.join(found) or 'none'}, but no {_TRAIN}; name the folder of one")
    return Source(path, folder, _cache_files(found[name]), [_dataset_part(name, found[name])])


def package(name: str) -> Any:
    """A module of the extra `datasets`; raises DataError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"Hugging Face data sets need the package {name.partition('.')[0]} ({error}): "
            "pip install 'dittocache[datasets]'"
        ) from error


def _dataset_part(name: str, dataset: Any) -> Part:
    def rows(columns: Sequence[str]) -> Rows:
        number = 0
        for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(BATCH_ROWS):
            for cells in batch.to_pylist():
                yield number, cells
                number += 1

    return Part(name, list(dataset.column_names), rows)


def _cache_files(dataset: Any) -> list[Path]:
    return [Path(file["filename"]) for file in dataset.cache_files]


def _parquet_rows(file: Path, columns: Sequence[str]) -> Rows:
    number = 0
    with package("pyarrow.parquet").ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as opened:
        for batch in opened.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False):
            for cells in batch.to_pylist():
                yield number, cells
                number += 1


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow."""
    return (str(error).splitlines() or [type(error).__name__])[0]
